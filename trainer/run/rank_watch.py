"""End all ranks of a run within seconds of the first that fails, and print once why.

Launchers do this late (DeepSpeed's gives each rank half a minute), only on one node, or not at all (ranks started by
hand or by srun). A rank that waits in a collective runs neither exception handlers nor Python's signal handlers. So
every rank runs two threads. One watches processes: its launcher, and the ranks on the same node. The other watches a
key in a store that all ranks share: a rank that fails writes its exit code there. This module does not import torch,
because watching begins before that.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from torch.distributed import Store

from trainer.cluster.process_space import process_space
from trainer.cluster.ranks import LaunchError
from trainer.config.text import printable
from trainer.run import processes

EXIT_FAILED = 1
# How long a main thread may take to exit by itself, and clean up, once the run has ended.
_GRACE_SECONDS = 5.0
# How long a failed rank waits before it prints: another may have failed first, or rank 0 may print the same.
_DOUBT_SECONDS = 2.0
_LAST_WORD_SECONDS = 1.0
_POLL_SECONDS = 0.5
# How long a rank tries to reach the others if it fails before it has connected to the store.
_PATIENCE_SECONDS = 10.0
# Keys in the store: who ended the run; how many ranks have connected, and how many know of the end; rank 0's port.
_END, _MET, _HEARD, _PORT = "end", "met", "heard", "port"
# Variables that are equal for all ranks of a run.
_OF_A_RUN = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID")


@dataclass(frozen=True)
class _Process:
    """The process of a rank. `place` is equal for processes that see each other (same host and PID namespace)."""

    rank: int
    pid: int
    place: str

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid})"


class RankWatch:
    """Watch the other ranks from this one. `watching` starts it, `meet` connects it with ranks on other nodes.

    `fail` ends the run. In a group of one, only the launcher is watched.
    """

    def __init__(self, rank: int, ranks: int, environment: Mapping[str, str] = os.environ) -> None:
        self._ranks = ranks
        self._environment = environment
        self._self = _Process(rank, os.getpid(), process_space())
        self._token = secrets.token_hex(8)
        self._store: Store | None = None
        self._store_watch: threading.Thread | None = None
        self._alone = ranks == 1
        self._lock = threading.Lock()
        self._code: int | None = None  # of the run, once it has ended
        self._finished = threading.Event()
        self._launcher_gone = False
        self._on_this_node: dict[int, _Process] = {rank: self._self}
        self._ended_early: list[_Process] = []  # before they could be watched
        self._selector = selectors.DefaultSelector()
        self._everyone: list[_Process] = []  # known once all have met
        self._connections: list[socket.socket] = []
        self._clean_up: list[Callable[[], object]] = []

    # --- beginning and end ---------------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[RankWatch]:
        """Watch the launcher and the ranks on this node during the `with` block."""
        self._watch_launcher()
        self._find_siblings()
        threading.Thread(target=self._watch_processes, name="process watch", daemon=True).start()
        try:
            yield self
        finally:
            self.finish()

    def meet(self, timeout: timedelta) -> None:
        """Open the store on rank 0, or connect to it; `timeout` is how long to wait for rank 0.

        Waits for no other rank. Raises `LaunchError` if the address or port is not this run's.
        """
        if self._alone:
            return
        try:
            self._store = self._join(timeout)
        except LaunchError:
            self._alone = True
            raise
        self._store_watch = threading.Thread(target=self._watch_store, name="store watch", daemon=True)
        self._store_watch.start()

    def finish(self) -> None:
        """Stop watching: all ranks have finished their work."""
        self._finished.set()
        # At exit Python stops daemon threads wherever they are. Inside the store's C++ code, that aborts the process.
        if self._store_watch is not None:
            self._store_watch.join(timeout=_GRACE_SECONDS)

    def before_leaving(self, clean_up: Callable[[], object]) -> None:
        """Call `clean_up` before this object ends the process, which does not unwind the main thread's stack.

        It runs in another thread, for a few seconds at most.
        """
        self._clean_up.append(clean_up)

    def fail(self, code: int, message: str | None = None, *, expected: bool = True) -> NoReturn:
        """End all ranks with exit code `code`. `message` is printed once for all ranks that fail.

        If another rank has failed before, this one prints nothing and exits with that rank's code. `expected`: all
        ranks are likely to fail alike, so rank 0 prints at once, without naming a rank.
        """
        self._leave_after(2 * _GRACE_SECONDS + _PATIENCE_SECONDS)
        if message is not None and self._store is None and not self._alone and not self._ended():
            with suppress(LaunchError):  # rank 0 cannot be reached: print alone
                self._store = self._join(timedelta(seconds=_PATIENCE_SECONDS))
        rank = self._self.rank
        end = time.monotonic() + (0.0 if rank == 0 and expected else _DOUBT_SECONDS)
        while not self._ended() and time.monotonic() < end:
            time.sleep(0.05)
        if not self._ended():
            named = message is not None and (rank > 0 or not expected)
            self._end_run(code, f"rank {rank}: {message}" if named else message)
        self._leave()

    # --- the end -------------------------------------------------------------------------------------------------

    def _ended(self) -> bool:
        """Return whether some rank has ended the run, and remember its exit code."""
        if self._code is None and self._store is not None:
            with suppress(Exception):  # rank 0 is gone, and the store with it
                if self._store.check([_END]):
                    self._accept_end(json.loads(self._store.get(_END))["code"])
        return self._code is not None

    def _end_run(self, code: int, message: str | None, *, prints_alone: bool = True) -> None:
        """Make `code` the exit code of all ranks and print `message`, unless another rank was first. Without a store to
        find out, print if `prints_alone`."""
        mine = json.dumps({"rank": self._self.rank, "code": code})
        with self._lock:
            if self._code is not None:
                return
            first, prints = mine, prints_alone
            if self._store is not None:
                with suppress(Exception):  # it ended with rank 0
                    first = self._store.compare_set(_END, "", mine).decode()
                    prints = first == mine
            if prints and message is not None:
                print(f"\n{printable(message)}", file=sys.stderr, flush=True)
            self._code = json.loads(first)["code"]

    def _accept_end(self, code: int) -> None:
        """Accept that another rank has ended the run: the main thread may clean up, for a limited time."""
        with self._lock:
            if self._code is not None:
                return
            self._code = code
        if self._store is not None:  # rank 0 waits for this before it ends the store
            with suppress(Exception):
                self._store.add(_HEARD, 1)
        self._leave_after(_GRACE_SECONDS)

    def _leave_after(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self._leave)
        timer.daemon = True
        timer.start()

    def _leave(self) -> NoReturn:
        """End this process without the interpreter's shutdown, which may wait for a collective."""
        if self._self.rank == 0 and self._store is not None:  # the store ends with this process
            end = time.monotonic() + _LAST_WORD_SECONDS + 2 * _POLL_SECONDS
            with suppress(Exception):
                while self._store.add(_HEARD, 0) < self._ranks - 1 and time.monotonic() < end:
                    time.sleep(0.05)
        for clean_up in self._clean_up:
            cleaning = threading.Thread(target=clean_up, name="clean up", daemon=True)
            cleaning.start()
            cleaning.join(timeout=_GRACE_SECONDS)
        self._lock.acquire(timeout=_LAST_WORD_SECONDS)  # never released: another thread may be printing
        for stream in filter(None, (sys.stdout, sys.__stdout__, sys.stderr)):
            with suppress(Exception):
                stream.flush()
        os._exit(EXIT_FAILED if self._code is None else self._code)

    def _report_lost(self, gone: list[_Process], *, prints: bool) -> None:
        """End the run because the processes `gone` have ended, unless one of them has written why to the store."""
        if self._finished.wait(_LAST_WORD_SECONDS) or self._ended():
            return
        message = (
            f"{', '.join(map(str, gone))} ended before the run did, and the other ranks cannot continue. Unless a "
            "message above says why, it was killed, for example for lack of memory"
        )
        self._end_run(EXIT_FAILED, None if self._launcher_gone else message, prints_alone=prints)
        self._leave_after(_GRACE_SECONDS)

    # --- the store -----------------------------------------------------------------------------------------------

    def _join(self, timeout: timedelta) -> Store:
        from torch.distributed import PrefixStore, TCPStore

        address, port = self._environment["MASTER_ADDR"], int(self._environment["MASTER_PORT"])
        launcher_opens = self._environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        opens = self._self.rank == 0 and not launcher_opens
        try:
            # torch's own store for the process group shares the server.
            server = TCPStore(address, port, None, opens, timeout, wait_for_workers=False, multi_tenant=True)
        except RuntimeError as error:
            raise LaunchError(
                f"rank {self._self.rank} cannot {'listen on' if opens else 'reach rank 0 at'} MASTER_ADDR={address}, "
                f"MASTER_PORT={port}: {str(error).splitlines()[0]}. Give the launcher another port (--master_port)"
            ) from error
        store = PrefixStore(f"strata/{self._environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)
        identity = json.dumps([self._self.pid, self._self.place, self._token])
        if store.compare_set(f"rank/{self._self.rank}", "", identity).decode() != identity:
            raise LaunchError(
                f"MASTER_PORT={port} of {address} belongs to another run, which has a rank {self._self.rank} already: "
                "give the launcher another port (--master_port)"
            )
        store.add(_MET, 1)
        return store

    def _watch_store(self) -> None:
        assert self._store is not None
        while not self._finished.wait(_POLL_SECONDS):
            try:
                met = self._store.add(_MET, 0)
                if not self._everyone and met >= self._ranks:
                    self._watch_all()
                if self._ended():
                    return
            except Exception:  # the store ended with rank 0
                self._report_rank_0_lost()
                return

    def _watch_all(self) -> None:
        """Watch the ranks on this node as processes. Rank 0 also watches a connection to each rank on another node: the
        operating system closes it when that rank ends."""
        assert self._store is not None
        identities = [self._store.get(f"rank/{rank}").decode() for rank in range(self._ranks)]
        self._everyone = [_Process(rank, *json.loads(identity)[:2]) for rank, identity in enumerate(identities)]
        for process in self._everyone:
            if process.place == self._self.place:
                self._watch(process)
        elsewhere = {identities[p.rank]: p for p in self._everyone if p.place != self._everyone[0].place}
        if elsewhere and self._self.rank == 0:
            listener = socket.create_server(("", 0), backlog=len(elsewhere))
            listener.setblocking(False)
            self._store.set(_PORT, str(listener.getsockname()[1]))
            self._connections.append(listener)
            self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener, elsewhere))
        elif self._self.rank in [p.rank for p in elsewhere.values()]:
            address = self._environment["MASTER_ADDR"], int(self._store.get(_PORT))
            with suppress(OSError):  # behind a firewall, only launchers and collectives notice a lost rank
                connection = socket.create_connection(address, timeout=_PATIENCE_SECONDS)
                _keep_alive(connection)
                connection.sendall(identities[self._self.rank].encode())
                self._connections.append(connection)

    def _accept(self, listener: socket.socket, identities: Mapping[str, _Process]) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:  # not a rank, and disconnected already
            return
        connection.settimeout(_LAST_WORD_SECONDS)
        _keep_alive(connection)
        self._connections.append(connection)
        self._selector.register(connection, selectors.EVENT_READ, partial(self._identify, connection, identities))

    def _identify(self, connection: socket.socket, identities: Mapping[str, _Process]) -> None:
        """Read which rank a connection belongs to; close it if it belongs to none."""
        self._selector.unregister(connection)
        said = b""
        with suppress(OSError):
            said = connection.recv(4096)
        process = identities.get(said.decode(errors="replace"))
        if process is None:
            connection.close()
        else:
            self._selector.register(connection, selectors.EVENT_READ, process)

    def _report_rank_0_lost(self) -> None:
        if 0 in self._on_this_node:
            return  # its process is watched
        elsewhere = [p.rank for p in self._everyone if p.place != self._everyone[0].place]
        # A rank on the node of rank 0 prints, if there is one; otherwise the first on another node.
        all_elsewhere = len(elsewhere) == self._ranks - 1
        if self._everyone:
            prints = all_elsewhere and self._self.rank == min(elsewhere)
        else:
            prints = self._self.rank == 1
        gone = self._everyone[0] if self._everyone else _Process(0, 0, "")
        self._report_lost([gone], prints=prints)

    # --- processes -----------------------------------------------------------------------------------------------

    def _watch_processes(self) -> None:
        while not self._finished.is_set():
            if not self._everyone:
                self._find_siblings()
            gone: list[_Process] = []
            for key, _ in self._selector.select(_POLL_SECONDS):
                if isinstance(key.data, _Process):
                    gone.append(key.data)
                    self._selector.unregister(key.fileobj)
                else:
                    key.data()
            with self._lock:
                gone, self._ended_early = [*gone, *self._ended_early], []
            if gone:
                alive = self._on_this_node.keys() - {process.rank for process in gone}
                all_here = all(process.rank in self._on_this_node for process in gone)
                self._report_lost(gone, prints=not all_here or self._self.rank == min(alive))
                if self._code is not None:
                    return

    def _watch(self, process: _Process) -> None:
        if process.rank in self._on_this_node or not hasattr(os, "pidfd_open"):
            return
        self._on_this_node[process.rank] = process
        try:
            self._selector.register(os.pidfd_open(process.pid), selectors.EVENT_READ, process)
        except ProcessLookupError:
            with self._lock:
                self._ended_early.append(process)
        except OSError:  # the operating system has no process descriptors
            self._on_this_node.pop(process.rank)

    def _find_siblings(self) -> None:
        """Watch ranks that have the same parent process. Used until all ranks have connected to the store."""
        for pid in processes.children(os.getppid()):
            if pid == os.getpid():
                continue
            variables = processes.variables_of(pid)
            rank = variables.get("RANK", variables.get("SLURM_PROCID", ""))
            own = processes.variables_of(os.getpid())
            if rank.isdigit() and all(variables.get(name) == own.get(name) for name in _OF_A_RUN):
                if int(rank) != self._self.rank:
                    self._watch(_Process(int(rank), pid, self._self.place))

    def _watch_launcher(self) -> None:
        if not hasattr(os, "pidfd_open"):
            return
        for pid in processes.launchers(self._environment):
            try:
                descriptor = None if pid is None else os.pidfd_open(pid)
            except ProcessLookupError:
                descriptor = None
            except OSError:
                return
            if descriptor is None:
                self._stop()
            else:
                self._selector.register(descriptor, selectors.EVENT_READ, partial(self._stop, descriptor))

    def _stop(self, descriptor: int | None = None) -> None:
        """Send SIGTERM to this process: its launcher has ended, and could not stop it later."""
        if descriptor is not None:
            self._selector.unregister(descriptor)
        if not self._launcher_gone:
            self._launcher_gone = True
            if self._self.rank == min(self._on_this_node):
                print("\nThe launcher has ended, so its ranks stop", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)


def _keep_alive(connection: socket.socket) -> None:
    """Let the operating system close a connection if the other node no longer answers, for example without power."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
