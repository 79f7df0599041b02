"""Opponents, side by side in one run: ``python -m benchmarks.peers``. ``README.md`` says who, how, and what is fair."""
