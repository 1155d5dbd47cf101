"""Write src/fedamole/bundled/methods.json, from which `fedamole methods` and reports read descriptions of the methods.

Run it after a change to the registry, or to a method's docstring, attributes or defaults:

    python scripts/describe_methods.py
"""

import json
from pathlib import Path

from fedamole.methods import METHODS, describe

if __name__ == "__main__":
    path = Path(__file__).parents[1] / "src" / "fedamole" / "bundled" / "methods.json"
    text = json.dumps([describe(name) for name in METHODS], indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
