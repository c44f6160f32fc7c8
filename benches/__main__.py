"""The program behind `fastllava bench`: python -P benches/__main__.py COMMAND ..., from any folder.

The package `benches` is known by its place. Neither this folder nor the root is left on the import path: there `kernels` would be
kernels.py here or the folder beside it, and transformers takes either for a library of Hugging Face.
"""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

sys.path[:] = [place for place in sys.path if Path(place).resolve() not in (HERE, HERE.parent)]
if "benches" not in sys.modules:
    spec = importlib.util.spec_from_file_location("benches", HERE / "__init__.py", submodule_search_locations=[str(HERE)])
    assert spec is not None  # noqa: S101 (the file is there)
    sys.modules["benches"] = importlib.util.module_from_spec(spec)

if __name__ == "__main__":
    from benches import kit

    # Before anything else is imported: on a machine that was just rented it may not be there.
    if sys.argv[1:2] == ["gpu"] and not {"--help", "-h"} & set(sys.argv) and (lacking := kit.complaint()) is not None:
        print(f"error: bench gpu: {lacking}", file=sys.stderr)
        sys.exit(2)
    from fastllava.console.allocator import let_memory_grow

    let_memory_grow()
    from benches.cli import main

    main()
