"""Items into packs: what the planner packs experts with. Knows nothing of experts, GPUs or ranks."""
