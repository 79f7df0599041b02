"""Benchmarks that ship with the package: ``lcm-rt bench``. ``benchmarks/README.md`` defines each figure."""
