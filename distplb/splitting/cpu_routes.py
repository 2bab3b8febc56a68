"""One GPU's part of a split's routes, for Numba. Only `routes` imports this.

Shapes: E experts, M GPUs of nodes of D, G own slots and R replica slots on each GPU, P = M × (G + R) physical slots;
H holders of one expert: its home and the GPUs of its replicas.
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["exchange"]

compiled = njit(cache=True, nogil=True, error_model="numpy")


@compiled
def exchange(counts, home, quota, replica, slot_expert, send, receive, gpus_per_node, gpu):
    """Fill `send [M, G + R]` and `receive [M, G + R]`, which are 0 before; return whether own slots fit the homes.

    (1) List the physical slots of each expert, in the order of GPUs. (2) If it has no replica, all its tokens go home.
    (3) Else they go to its holders as in `routes`.
    """
    num_gpus, width = send.shape
    first, following = np.full(len(home), -1, np.int64), np.empty(send.size, np.int64)
    if not _list_slots(home, slot_expert, replica, first, following):
        return False
    left, room, slot = np.empty(num_gpus, np.int64), np.empty(num_gpus, np.int64), np.empty(num_gpus, np.int64)
    for expert in range(len(home)):
        place = first[expert]
        if following[place] < 0:
            send[home[expert], place % width] = counts[gpu, expert]
            if home[expert] == gpu:
                receive[:, place % width] = counts[:, expert]
            continue
        left[:] = counts[:, expert]
        holders = 0
        while place >= 0:
            slot[holders], room[holders] = place, quota[expert, place // width]
            holders += 1
            place = following[place]
        _send_in_order(left, room[:holders], slot[:holders], gpus_per_node, gpu, send, receive)
    return True


@compiled
def _list_slots(home, slot_expert, replica, first, following):
    """Step (1): the first physical slot `[E]` of each expert, and the one after each `[P]`, -1 for none.

    False unless each expert is in exactly one own slot, on its home.
    """
    (num_gpus, own_slots), slots = slot_expert.shape, replica.shape[1]
    is_owned, owned = np.zeros(len(home), np.bool_), 0
    for gpu in range(num_gpus - 1, -1, -1):  # each slot is put in front of those that were listed before
        for slot in range(own_slots + slots):
            expert = slot_expert[gpu, slot] if slot < own_slots else replica[gpu, slot - own_slots]
            if expert == -1:
                continue
            if slot < own_slots:
                if expert < 0 or expert >= len(home) or home[expert] != gpu or is_owned[expert]:
                    return False
                is_owned[expert] = True
                owned += 1
            place = gpu * (own_slots + slots) + slot
            following[place] = first[expert]
            first[expert] = place
    return owned == len(home)


@compiled
def _send_in_order(left, room, slot, gpus_per_node, gpu, send, receive):
    """Step (3): sources keep their own tokens, then send within their node, then anywhere; both sides in order.

    Args:
        left: `[M]`, the tokens of each source; they are used up.
        room: `[H]`, the quota of each holder; it is used up.
        slot: `[H]`, the physical slot of each holder.
        gpus_per_node: D.
        gpu: the GPU whose part it is.
        send: `[M, G + R]`, filled.
        receive: `[M, G + R]`, filled.
    """
    num_gpus, width = send.shape
    for size in (1, gpus_per_node, num_gpus):
        source = 0
        for nth in range(len(slot)):
            holder, own = slot[nth] // width, slot[nth] % width
            begin = holder // size * size
            source = max(source, begin)  # sources before it have sent all that they may
            while room[nth] > 0 and source < begin + size:
                amount = min(left[source], room[nth])
                left[source] -= amount
                room[nth] -= amount
                if source == gpu:
                    send[holder, own] += amount
                if holder == gpu:
                    receive[source, own] += amount
                if left[source] == 0:
                    source += 1
