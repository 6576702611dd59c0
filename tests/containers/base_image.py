"""The images that everything is built on: from a registry, or, without one, made here with debootstrap."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.containers.daemon import Daemon
from tests.containers.shell import run, succeeds

PYTHON_IMAGE = "python:3.12-slim-bookworm"
REDIS_IMAGE = "redis:7.4-bookworm"
OWN_IMAGE = "hortator-test-base"
MIRROR = "http://deb.debian.org/debian"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


def base_images(daemon: Daemon) -> dict[str, str]:
    """BASE_IMAGE and REDIS_IMAGE: the environment's, a registry's, or one of our own for both."""
    given = {name: os.environ[name] for name in ("BASE_IMAGE", "REDIS_IMAGE") if name in os.environ}
    wanted = {"BASE_IMAGE": PYTHON_IMAGE, "REDIS_IMAGE": REDIS_IMAGE} | given
    if all(has(daemon, image) for image in wanted.values()):
        return wanted
    make_base(daemon)
    return {"BASE_IMAGE": OWN_IMAGE, "REDIS_IMAGE": OWN_IMAGE} | given


def has(daemon: Daemon, image: str) -> bool:
    """Here already, or a registry has it."""
    return any(
        succeeds(["docker", *command, image], env=daemon.env, timeout_s=120)
        for command in (["image", "inspect"], ["pull"])
    )


def make_base(daemon: Daemon) -> None:
    """Debian with Python and redis-server.  It trusts whom this host trusts: a proxy may stand before the index."""
    if shutil.which("debootstrap") is None or os.geteuid() != 0:
        raise RuntimeError(
            f"no registry has {PYTHON_IMAGE}: name an image with BASE_IMAGE (and REDIS_IMAGE), or install debootstrap"
            " and run this as root"
        )
    with tempfile.TemporaryDirectory(prefix="hortator-base-") as directory:
        root = Path(directory) / "root"
        packages = "python3,python3-venv,ca-certificates,redis-server"
        run(
            *("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(root), MIRROR), timeout_s=600
        )
        if Path(CERTIFICATES).exists():
            shutil.copy(CERTIFICATES, root / CERTIFICATES.lstrip("/"))
        for rubbish in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(root / rubbish, ignore_errors=True)
        import_image(root, env=daemon.env)


def import_image(root: Path, *, env: Mapping[str, str]) -> None:
    """The tree as an image of one layer."""
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as tar:
        subprocess.run(
            ["docker", "import", "--change", f"ENV PATH={path} PIP_CERT={CERTIFICATES}", "-", OWN_IMAGE],
            stdin=tar.stdout,
            stdout=subprocess.DEVNULL,
            env=dict(env),
            timeout=300,
            check=True,
        )
