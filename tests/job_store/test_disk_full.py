"""A disk that fills up for real: a tmpfs of 24 MiB in a mount namespace of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path
from api_schemas.errors import InsufficientStorage
from api_schemas.files import CompleteRequest
from job_store.settings import Settings
from tests.job_store.api_stores import ApiStores

stores = ApiStores(Settings(home=Path(sys.argv[1]) / "home"))
upload = stores.open(b"", bytes=15_000_000)
parts = [stores.send(upload.id, bytes(5_000_000)).id for _ in range(3)]

def fill():
    with stores.files.land(limit=10**9) as landing:
        for _ in range(30_000):
            landing.write(bytes(1000))

for act in (fill, lambda: stores.uploads.complete(upload.id, CompleteRequest(part_ids=parts))):
    try:
        act()
    except InsufficientStorage as error:
        print(error.code, end=" ")
print(stores.uploads.get(upload.id).status, len(list(stores.layout.home.glob("tmp/*"))))
"""
MOUNT = 'mount -t tmpfs -o size=24m tmpfs "$1" && exec "$2" -c "$3" "$1"'


def can_mount() -> bool:
    """Whether this user may open a mount namespace."""
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not can_mount(), reason="no mount namespaces for this user: a disk cannot be filled for real")
def test_a_full_disk_has_a_name_and_loses_nothing(tmp_path: Path) -> None:
    command = ["unshare", "-rm", "sh", "-c", MOUNT, "sh", str(tmp_path), sys.executable, PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "disk_full disk_full pending 0\n", done.stderr
