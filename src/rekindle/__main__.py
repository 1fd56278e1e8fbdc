"""`python -m rekindle` is the `rekindle` command."""

import sys

from rekindle.cli import main

sys.exit(main())
