"""``python -m lcm_rt`` is ``lcm-rt``."""

from lcm_rt.cli import main

main()
