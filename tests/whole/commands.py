"""Commands of `arra` in one process, as JSON lists of arguments: `commands.py '["train", ...]' '["generate", ...]'`.

Starting the processes takes longer than the work of a toy. The first command that fails ends the process with its code.
"""

import json
import sys

from arra.cli import main

if __name__ == "__main__":
    for arguments in [json.loads(text) for text in sys.argv[1:]]:
        sys.argv = ["arra", *arguments]
        try:
            main()
        except SystemExit as leaving:
            if leaving.code:
                raise
