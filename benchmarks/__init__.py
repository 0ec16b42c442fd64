"""What is measured, never asserted in tests. `results/` keeps what was measured, where, on what."""
