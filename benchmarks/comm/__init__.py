"""The communicators on real devices."""
