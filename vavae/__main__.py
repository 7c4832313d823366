"""``python -m vavae`` is the console command, so that torchrun can start it."""

import sys

from vavae.cli.main import main

sys.exit(main())
