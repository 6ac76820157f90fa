"""Try every fault and print what followed, as a table in Markdown.

python -m tests.faults                 # all: minutes, real servers; with an engine at DOCKER_HOST containers too
python -m tests.faults -k promotion
"""

import sys

import pytest

sys.exit(pytest.main(["-m", "fault", "--faults", "-n", "2", "--dist", "loadgroup", *sys.argv[1:]]))
