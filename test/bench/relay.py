"""Relays connections to a port of 127.0.0.1, as if it were a ROUND_TRIP of milliseconds away.

    relay.py PORT ROUND_TRIP

It prints the port that it listens on. What it reads it sends on half of a round trip later,
whatever else is on its way. The kernel connects at once where a distant host would take a round
trip, so the first bytes of each connection wait for one more. Threads rather than asyncio, whose
timers are rounded up to milliseconds.
"""
import queue
import socket
import sys
import threading
import time


def forward(source, sink, delay, first_delay=0.0):
    """Sends to one socket what comes from another, and then the end."""
    chunks = queue.SimpleQueue()

    def send():
        while True:
            due, data = chunks.get()
            time.sleep(max(due - time.monotonic(), 0))
            try:
                if not data:
                    return sink.shutdown(socket.SHUT_WR)
                sink.sendall(data)
            except OSError:
                return source.close()

    threading.Thread(target=send, daemon=True).start()
    data, open_until = b' ', time.monotonic() + first_delay
    while data:
        try:
            data = source.recv(65536)
        except OSError:
            data = b''
        chunks.put((max(time.monotonic(), open_until) + delay, data))


def main():
    port, delay = int(sys.argv[1]), float(sys.argv[2]) / 2000
    listener = socket.create_server(('127.0.0.1', 0), backlog=128)
    print(listener.getsockname()[1], flush=True)
    while True:
        near, _ = listener.accept()
        far = socket.create_connection(('127.0.0.1', port))
        for sock in near, far:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=forward, args=(near, far, delay, 2 * delay), daemon=True).start()
        threading.Thread(target=forward, args=(far, near, delay), daemon=True).start()


main()
