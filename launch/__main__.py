"""`python -m launch` is `tp-decoders`."""

import sys

from launch.main import main

sys.exit(main())
