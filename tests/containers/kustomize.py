"""What `kubectl apply -k FOLDER` would apply: by kubectl where there is one, else from the files that it would read."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

FILE = "kustomization.yaml"


def sources(folder: Path, *, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Every file of manifests that the folder leads to.  Raises ValueError for a cycle and for what is not there."""
    if folder in above or any(folder in parent.parents for parent in above):
        raise ValueError(f"cycle detected: {' -> '.join(map(str, (*above, folder)))}")
    for name in yaml.safe_load((folder / FILE).read_text(encoding="utf-8")).get("resources", []):
        source = (folder / name).resolve()
        if source.is_dir():
            yield from sources(source, above=(*above, folder))
        elif source.is_file():
            yield source
        else:
            raise ValueError(f"{folder / FILE}: {name} is not there")


def built(folder: Path) -> list[dict[str, Any]]:
    """The manifests of the folder, as kubectl's kustomize makes them; with our own eyes where there is no kubectl."""
    files = list(sources(folder.resolve()))
    if shutil.which("kubectl"):
        done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(done.stderr.strip())
        return list(yaml.safe_load_all(done.stdout))
    documents = [document for file in files for document in yaml.safe_load_all(file.read_text(encoding="utf-8"))]
    for patch in yaml.safe_load((folder / FILE).read_text(encoding="utf-8")).get("patches", []):
        target = patch["target"]
        [document] = [d for d in documents if (d["kind"], d["metadata"]["name"]) == (target["kind"], target["name"])]
        for operation in yaml.safe_load(patch["patch"]):
            apply(operation, document)
    return documents


def apply(operation: dict[str, Any], document: Any) -> None:
    """One operation of a JSON patch (RFC 6902): `add` to a table."""
    assert operation["op"] == "add", json.dumps(operation)
    *path, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    for part in path:
        document = document[int(part) if isinstance(document, list) else part]
    document[last] = operation["value"]
