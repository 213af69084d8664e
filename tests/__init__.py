"""Tests of mxcompile."""

import os

# As the command line has it, before anything imports torch: tests run beside other work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
