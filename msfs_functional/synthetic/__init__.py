"""Data that the project makes itself: seeded, licence-free, the same on every machine."""
