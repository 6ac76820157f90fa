"""A job whose second process is unlike the first: `python -m tests.training.second_differs NAME VALUE SPEC OUT …`.

NAME is an environment variable that only the second process gets, or `spec`, of which it then reads another.
"""

from __future__ import annotations

import os
import sys

from components.training import job

if __name__ == "__main__":
    name, value, spec, *others = sys.argv[1:]
    if os.environ["RANK"] == "1":
        if name == "spec":
            spec = value
        else:
            os.environ[name] = value
    sys.exit(job.main([spec, *others]))
