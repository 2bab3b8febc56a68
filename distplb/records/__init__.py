"""The files that a job writes, events and traces; `foreign` reads files of other programs. May import `core`."""
