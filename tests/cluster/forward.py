"""Joins the host's network to the cluster's: accepts on a socket that was opened there, connects from here.

A socket belongs to the network namespace in which it was opened, whoever holds it. So this runs inside the cluster's
namespaces, with the listening socket inherited from the host.

    python -m cluster.forward LISTENING_FD HOST PORT
"""

import asyncio
import socket
import sys

CHUNK_BYTES = 1 << 16
CONNECT_SECONDS = 10


async def _copy(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
    while data := await source.read(CHUNK_BYTES):
        to.write(data)
        await to.drain()
    to.write_eof()  # one direction may end before the other


async def _join(near: tuple[asyncio.StreamReader, asyncio.StreamWriter], host: str, port: int) -> None:
    writers = [near[1]]
    try:
        far = await asyncio.wait_for(asyncio.open_connection(host, port), CONNECT_SECONDS)
        writers.append(far[1])
        async with asyncio.TaskGroup() as directions:  # a broken direction ends the other
            directions.create_task(_copy(near[0], far[1]))
            directions.create_task(_copy(far[0], near[1]))
    except* (OSError, TimeoutError) as broken:
        print(f"connection ended: {broken.exceptions[0]!r}", file=sys.stderr, flush=True)
    finally:
        for writer in writers:
            writer.close()


async def forward(listening: socket.socket, host: str, port: int) -> None:
    """Forwards every connection to ``listening`` to ``host:port``, for ever."""
    server = await asyncio.start_server(lambda reader, writer: _join((reader, writer), host, port), sock=listening)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(forward(socket.socket(fileno=int(sys.argv[1])), sys.argv[2], int(sys.argv[3])))
