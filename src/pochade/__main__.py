"""`python -m pochade` is the same program as `pochade`."""

import sys

from pochade.cli import main

sys.exit(main())
