"""While data is tokenised there is no process group, so nothing can time out, however long it takes."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from tests import forked
from tests.launching import free_port, write_inputs


def _notice_soon(rank: int) -> None:
    """Print the notice that another process tokenises after 1 second instead of 30."""
    import trainer.data.cached

    trainer.data.cached.LOCK_NOTICE_SECONDS = 1


@pytest.mark.slow
def test_ranks_that_wait_for_the_data_have_no_group_yet(tmp_path: Path) -> None:
    """The test tokenises very slowly: it holds the lock of the cache, as the process that builds it does."""
    write_inputs(tmp_path)
    prepared = forked.command(["prepare", "tiny.yaml"], tmp_path)
    assert prepared.code == 0, prepared.everything
    (lock,) = (tmp_path / "runs" / "cache").glob("*.lock")
    port = free_port()
    with FileLock(lock):
        shutil.rmtree(lock.with_suffix(""))
        ranks = forked.start(["tiny.yaml"], tmp_path, variables={"MASTER_PORT": str(port)}, before=_notice_soon)
        end = time.monotonic() + 180
        while ranks.said.count("waiting for another process to tokenise the data") < 4:  # each rank twice
            assert ranks.poll() is None and time.monotonic() < end, ranks.said
            time.sleep(0.2)
        for process in ranks.processes:  # has the store in which ranks report their end, and no other connection
            connections = psutil.Process(process.pid).net_connections()
            assert connections, ranks.said
            for connection in connections:
                assert port in (connection.laddr.port, *(address.port for address in filter(None, [connection.raddr])))
    finished = ranks.wait()
    assert finished.code == 0, finished.everything
