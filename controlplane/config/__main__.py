"""Print the JSON schema, as `rung.schema.json` has it."""

from __future__ import annotations

import json
import sys

from controlplane.config import config_schema

sys.stdout.write(json.dumps(config_schema(), indent=2) + "\n")
