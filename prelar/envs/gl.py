"""Which OpenGL draws MuJoCo's images without a display.

`ensure()` settles MUJOCO_GL before mujoco is imported: a user's own setting is kept where it can draw, or
refused; otherwise EGL where a graphics card answers, else OSMesa, else EGL in software. The answer goes into
the environment, so that worker processes inherit it and only the first process of a run pays for the probe
(about 0.3 s). Software drawing is pinned to llvmpipe, one thread per process and no shader cache in the
user's home: the same pixels in every process of a machine.

`python -m prelar.envs.gl` says whether a backend works (exit status 0) or what to install (exit status 2);
with `--install` it first tries to install one through apt.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from prelar.utils.errors import UserError, run_main

BACKENDS = ("egl", "osmesa")
KNOWN = (*BACKENDS, "glfw", "glx")
PACKAGES = (("libosmesa6",), ("libegl1", "libgl1", "libgl1-mesa-dri"))
REMEDY = "no OpenGL for headless MuJoCo; run `apt-get install libosmesa6` as root"
SOFTWARE = ("llvmpipe", "softpipe", "swrast", "software")
TIMEOUT = 60.0
TRIED = "PRELAR_MUJOCO_GL_TRIED"
"""Variable that tells child processes which backend has drawn."""
MESA = {"GALLIUM_DRIVER": "llvmpipe", "LP_NUM_THREADS": "1", "MESA_SHADER_CACHE_DISABLE": "true"}

_PROBE = """
import mujoco
from OpenGL import GL
with mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8) as renderer:
    renderer.render()
    print(GL.glGetString(GL.GL_RENDERER).decode())
"""


def has_card(devices: Path = Path("/dev")) -> bool:
    """Whether the kernel shows a graphics card that EGL could use."""
    return any(True for pattern in ("dri/renderD*", "nvidia[0-9]*") for _ in devices.glob(pattern))


def probe(backend: str) -> str | None:
    """Name of the OpenGL renderer that draws an empty scene with `backend`, in a process of its own.

    None where the backend cannot draw, crashes or hangs.
    """
    settings = {name: value for name, value in os.environ.items() if name != "PYOPENGL_PLATFORM"}
    settings |= MESA | {"MUJOCO_GL": backend}
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _PROBE], env=settings, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def choose() -> str | None:
    """The backend to use on this machine; None where none works."""
    if has_card():
        renderer = probe("egl")
        if renderer and not any(word in renderer.lower() for word in SOFTWARE):
            return "egl"
    return next((backend for backend in reversed(BACKENDS) if probe(backend)), None)


def ensure() -> str:
    """Settle MUJOCO_GL for this process and its children, and return it.

    Call it before mujoco is imported. Raises `UserError` where no backend works, or not the one that the user
    has set, and where mujoco is already loaded without one.
    """
    for name, value in MESA.items():
        os.environ.setdefault(name, value)
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    if chosen and chosen not in KNOWN:
        raise UserError(f"MUJOCO_GL = {chosen}: unset it, or choose one of {', '.join(BACKENDS)}")
    if chosen and chosen == os.environ.get(TRIED):
        return chosen
    if chosen and probe(chosen) is None:
        other = choose()
        remedy = f"unset it, or set it to {other}, which can" if other else f"unset it; {REMEDY}"
        raise UserError(f"MUJOCO_GL={chosen}: cannot draw here; {remedy}")
    if not chosen and "mujoco" in sys.modules:
        raise UserError("mujoco was imported before its OpenGL was chosen; set MUJOCO_GL=osmesa (or egl)")
    found = chosen or choose()
    if found is None:
        raise UserError(REMEDY)
    os.environ |= {"MUJOCO_GL": found, TRIED: found}
    os.environ.pop("PYOPENGL_PLATFORM", None)  # mujoco refuses any other than its own backend's
    return found


def install() -> bool:
    """Install software OpenGL through apt where this user may; whether a package was installed."""
    apt = shutil.which("apt-get")
    sudo = shutil.which("sudo")
    if apt is None or (os.geteuid() != 0 and sudo is None):
        return False
    prefix = [] if os.geteuid() == 0 else [str(sudo), "-n"]
    _quiet([*prefix, apt, "update"])
    return any(
        _quiet([*prefix, apt, "install", "-y", "--no-install-recommends", *names]) for names in PACKAGES
    )


def _quiet(command: Iterable[str]) -> bool:
    """Run a command without questions; whether it succeeded. Its output is shown only by its exit status."""
    settings = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    return (
        subprocess.run(
            list(command), env=settings, stdin=subprocess.DEVNULL, capture_output=True, check=False
        ).returncode
        == 0
    )


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `python -m prelar.envs.gl`."""
    parser = argparse.ArgumentParser(prog="python -m prelar.envs.gl", description="Check headless OpenGL.")
    parser.add_argument("--install", action="store_true", help="install one through apt where none works")
    options = parser.parse_args(arguments)
    try:
        backend = ensure()
    except UserError:
        if not options.install or choose():
            raise
        print(f"no OpenGL for headless MuJoCo; installing {' '.join(PACKAGES[0])} through apt", flush=True)
        install()
        backend = ensure()
    print(f"OpenGL for MuJoCo: {backend}")


if __name__ == "__main__":
    run_main(main)
