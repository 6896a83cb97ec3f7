"""`python -m local_cloud up|down`, which `localstack/up` and `localstack/down` run."""

import sys

from local_cloud.command import main

sys.exit(main())
