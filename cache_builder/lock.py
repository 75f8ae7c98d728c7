"""One builder a directory: a lock that tells a living owner from a dead one, on local disks and on object stores."""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from specauf.cache.location import TEMPORARY, Location
from specauf.cache.reader import LOCK
from specauf.errors import UserError

BEAT_SECONDS, STALE_SECONDS = 15.0, 120.0


class LockLostError(UserError):
    """The directory is no longer this build's: nothing may be written there, and nobody is left to wait for."""


@dataclass(frozen=True)
class Owner:
    """Who builds.

    Attributes:
        token: random, tells two owners apart.
        host: machine, with its boot id where there is one.
        pid: process.
        born: when the process started, in the kernel's clock ticks, so that a reused pid is not mistaken for it.
        beat: seconds since the epoch when the owner last said that it lives.
    """

    token: str
    host: str
    pid: int
    born: int
    beat: float

    @property
    def alive(self) -> bool:
        """Whether it still builds: on this machine by its process, elsewhere by its last sign of life."""
        if self.host == _host():
            return _born(self.pid) == self.born
        return time.time() - self.beat < STALE_SECONDS


class BuildLock:
    """Held while a cache is built.

    A local lock is made by exclusive creation. Object stores have none: there the last writer wins, and an owner that
    finds another's token in its place stops.

    Args:
        place: the cache's directory.
    """

    def __init__(self, place: Location) -> None:
        self.place = place
        self.me = Owner(secrets.token_hex(8), _host(), os.getpid(), _born(os.getpid()), time.time())
        self._done = threading.Event()
        self._lost = False
        self._heard = time.monotonic()
        self._thread = threading.Thread(target=self._keep_alive, name="cache-lock", daemon=True)

    def __enter__(self) -> "BuildLock":
        if self.place.is_file():
            raise UserError(f"{self.place.url} is a file, expected a directory for the cache: give another --out")
        found = _owner(self.place)
        if found is not None and found.alive:
            raise self._taken(found)
        if found is not None:
            self._bury(found)
        self._write_first()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()
        owner = _owner(self.place)
        if owner is not None and owner.token == self.me.token:
            self.place.remove(LOCK)

    def check(self) -> None:
        """Stop when another builder has taken the directory over, or may have; cheap, for between two steps.

        Raises:
            LockLostError: the lock is another's.
            UserError: for long no sign of life has reached the store, and it still does not answer.
        """
        if self._lost:
            raise _taken_over(self.place)
        if time.monotonic() - self._heard > STALE_SECONDS:
            self.confirm()

    def confirm(self) -> None:
        """As `check`, by the lock itself: before work is begun, and before anything is replaced.

        Raises:
            LockLostError: the lock is gone, or another's.
            UserError: it cannot be read.
        """
        _confirm(self.place, self.me)

    def _taken(self, owner: Owner) -> UserError:
        where = "" if owner.host == _host() else f" on {owner.host.split('/')[0]}"
        return UserError(
            f"{self.place.url} is being built by process {owner.pid}{where}: wait for it, or end it and run this again"
        )

    def _bury(self, dead: Owner) -> None:
        """Take a dead owner's lock away, so that only one of several heirs does it."""
        local = self.place.local
        if local is None:
            return
        grave = local / f"builder-dead{TEMPORARY}{self.me.pid}"
        try:
            (local / LOCK).rename(grave)
        except FileNotFoundError:
            return
        moved = _parse(grave.read_bytes())
        if moved.token != dead.token:
            # A living heir was faster, and this was its lock: put it back.
            with contextlib.suppress(FileExistsError):
                _place_once(grave, local / LOCK)
            grave.unlink()
            raise self._taken(moved)
        grave.unlink()

    def _write_first(self) -> None:
        data = json.dumps(asdict(self.me)).encode()
        local = self.place.local
        if local is None:
            self.place.write(LOCK, data)
            time.sleep(1.0)
            winner = _owner(self.place)
            if winner is not None and winner.token != self.me.token:
                raise self._taken(winner)
            return
        draft = f"builder{TEMPORARY}{self.me.pid}"
        self.place.write(draft, data)
        try:
            _place_once(local / draft, local / LOCK)
        except FileExistsError:
            raise self._taken(_owner(self.place) or self.me) from None
        finally:
            self.place.remove(draft)

    def _keep_alive(self) -> None:
        while not self._lost and not self._done.wait(BEAT_SECONDS):
            # A store's hiccup passes until the next beat, and a full disk is for the builder to report.
            with contextlib.suppress(UserError, OSError):
                self._beat()

    def _beat(self) -> None:
        owner = _owner(self.place)
        if owner is not None and owner.token != self.me.token:
            self._lost = True
            return
        self.place.write(LOCK, json.dumps(asdict(self.me) | {"beat": time.time()}).encode())
        self._heard = time.monotonic()


class RankLock:
    """A build's lock as seen by its other ranks, which the first one told who holds it.

    Args:
        place: the cache's directory.
        owner: the first rank.
    """

    def __init__(self, place: Location, owner: Owner) -> None:
        self.place, self.owner = place, owner
        # Ranks elsewhere, or started by SLURM, are no children of it; they see its end by the next builder's lock.
        self._child = os.getppid() == owner.pid

    def check(self) -> None:
        """Stop when the first rank, which started this one, has died; cheap, for between two steps.

        Raises:
            LockLostError: it has.
        """
        if self._child and os.getppid() != self.owner.pid:
            raise LockLostError(f"{self.place.url}: the first rank has ended: run the same command again to go on")

    def confirm(self) -> None:
        """As `BuildLock.confirm`, and `check`."""
        self.check()
        _confirm(self.place, self.owner)


def _confirm(place: Location, mine: Owner) -> None:
    try:
        owner = _owner(place)
    except OSError:
        # A network's file system may lose a file that its owner replaces while it is read here: once, not twice.
        owner = _owner(place)
    if owner is None:
        raise LockLostError(f"{place.url}: {LOCK} is gone: run the same command again to go on from here")
    if owner.token != mine.token:
        raise _taken_over(place)


def _taken_over(place: Location) -> "LockLostError":
    return LockLostError(f"{place.url}: another builder took this cache over: this one stops")


def _owner(place: Location) -> Owner | None:
    try:
        return _parse(place.read(LOCK))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _parse(data: bytes) -> Owner:
    try:
        return Owner(**json.loads(data))
    except (ValueError, TypeError):
        # A lock that was cut short belongs to a writer that died.
        return Owner("", "", 0, 0, 0.0)


def _place_once(draft: Path, lock: Path) -> None:
    """Give a file written aside its final name, unless another has it: exclusive, and never half written.

    Raises:
        FileExistsError: another has it.
    """
    try:
        os.link(draft, lock)
    except FileExistsError:
        raise
    except OSError:
        # A file system without hard links: exclusive all the same, but a reader may meet it empty, as a dead owner's.
        with lock.open("xb") as file:
            file.write(draft.read_bytes())


def _host() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text().strip()}" if boot.exists() else socket.gethostname()


def _born(pid: int) -> int:
    """When a process started; 0 when there is none, or no way to tell."""
    try:
        # The name in parentheses may hold anything, so fields are counted from behind it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return _born_without_proc(pid)
    # A zombie's work is over.
    return 0 if fields[0] == "Z" else int(fields[19])


def _born_without_proc(pid: int) -> int:
    if Path("/proc/self/stat").exists() or pid <= 0:
        return 0
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return 0
    except PermissionError:
        return 1
    return 1
