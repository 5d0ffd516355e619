"""A server whose idle connections end in every way, and proxies that refuse, for the tests.

Run as "front.py CERTIFICATE", with a PEM file of certificate and key. It prints one line of JSON,
the port of each behaviour, and serves until its standard input ends. A line there is a command,
and is answered by a line of JSON:

leave   does to each idle connection what its port is for
count   tells how many requests each port has answered; of "late" ones, that came after the end
"""
import contextlib
import json
import os
import select
import socket
import ssl
import struct
import sys
import threading
from collections import Counter

ANSWER = b'{"status": "running", "jobId": "00000000-0000-4000-8000-000000000000"}'
HTML = b"<html><head><title>400 Bad Request</title></head><body>Bad Request</body></html>"
TIMED_OUT = b"HTTP/1.1 408 Request Time-out\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
# A TLS alert: fatal, protocol_version
ALERT = b"\x15\x03\x01\x00\x02\x02\x46"

lock = threading.Lock()
counts = Counter()
round_of_leaving = 0


def count(name):
    with lock:
        counts[name] += 1


def read_request(sock):
    """Returns the head of a request, and has read its body; empty if the connection ends."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        if not more:
            return b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            length = int(line.split(b":")[1])
            while len(body) < length:
                body += sock.recv(65536)
    return head


def reply(sock, status, body, kind="application/json"):
    sock.sendall(f"HTTP/1.1 {status} Status\r\nContent-Type: {kind}\r\n"
                 f"Content-Length: {len(body)}\r\n\r\n".encode() + body)


# Ways to end an idle connection

def close_notify(sock):
    """The alert that closes TLS, and nothing more"""
    sock.settimeout(0)
    with contextlib.suppress(OSError):
        sock.unwrap()               # would wait for the other side's alert
    sock.settimeout(None)


def fin(sock):
    socket.socket.shutdown(sock, socket.SHUT_WR)


def rst(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def answer_408(sock):
    """An answer without a request, as load balancers give when their patience is over"""
    sock.sendall(TIMED_OUT)


def serve(name, sock, leave):
    """Answers requests; when told to, ends the connection, and waits for what still comes."""
    while read_request(sock):
        seen = round_of_leaving
        count(name)
        reply(sock, 200, ANSWER)
        while not select.select([sock], [], [], 0.02)[0]:
            if round_of_leaving != seen:
                leave(sock)
                if sock.fileno() >= 0 and read_request(sock):
                    count("late")
                return


def race(name, sock):
    """The second request of a connection meets its end."""
    if read_request(sock):
        count(name)
        reply(sock, 200, ANSWER)
        if read_request(sock):
            count(name)


def refuse(status):
    def proxy(name, sock):
        while read_request(sock):
            count(name)
            reply(sock, status, b"<html>No</html>", "text/html")
    return proxy


def close_at_once(name, sock):
    read_request(sock)
    count(name)


def html_400(name, sock):
    while read_request(sock):
        count(name)
        reply(sock, 400, HTML, "text/html")


def alert(name, sock):
    sock.recv(65536)
    count(name)
    sock.sendall(ALERT)
    sock.recv(65536)


def no_tls(name, sock):
    """Plain http where TLS is expected"""
    sock.recv(65536)
    count(name)
    reply(sock, 400, HTML, "text/html")


def nginx_400(name, sock):
    """What nginx says to a client without a certificate"""
    while read_request(sock):
        count(name)
        reply(sock, 400, b"<html><head><title>400 No required SSL certificate was sent</title></head></html>", "text/html")


def long_headers(lines):
    def answer(name, sock):
        read_request(sock)
        count(name)
        header = b"X-Long: " + b"x" * ((1 << 20) // lines) + b"\r\n"
        sock.sendall(b"HTTP/1.1 200 OK\r\n" + header * lines + b"Content-Length: 0\r\n\r\n")
        sock.recv(65536)
    return answer


def context(version, verify=False):
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(sys.argv[1])
    if verify:
        made.verify_mode = ssl.CERT_REQUIRED
    if version < ssl.TLSVersion.TLSv1_2:
        made.set_ciphers("ALL:@SECLEVEL=0")
    made.minimum_version = made.maximum_version = version
    return made


def listen(handle, tls=None):
    """Calls handle(socket) for each connection, in a new thread; returns the port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)

    def run(sock):
        with contextlib.suppress(OSError):
            if tls:
                sock = tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                try:
                    sock.do_handshake()
                except ssl.SSLError:        # let the client read the alert, not a reset
                    while socket.socket.recv(sock, 65536):
                        pass
                    raise
            handle(sock)
        with contextlib.suppress(OSError):
            sock.close()

    def accept():
        while True:
            threading.Thread(target=run, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname()[1]


def main():
    global round_of_leaving
    transports = {"plain": None, "tls12": context(ssl.TLSVersion.TLSv1_2),
                  "tls13": context(ssl.TLSVersion.TLSv1_3)}
    ports = {}
    for transport, tls in transports.items():
        for leave in (close_notify, fin, rst, answer_408):
            if tls or leave is not close_notify:
                name = f"{leave.__name__}_{transport}"
                ports[name] = listen(
                    lambda sock, name=name, leave=leave: serve(name, sock, leave), tls)
        name = f"race_{transport}"
        ports[name] = listen(lambda sock, name=name: race(name, sock), tls)
    others = {f"proxy_{status}": refuse(status) for status in (403, 407, 500, 502, 503)}
    others.update(proxy_close=close_at_once, html_400=html_400, alert=alert,
                  no_tls=no_tls, nginx_400=nginx_400,
                  long_header=long_headers(1), long_headers=long_headers(20))
    for name, handle in others.items():
        ports[name] = listen(lambda sock, name=name, handle=handle: handle(name, sock))
    ports["tls11"] = listen(lambda sock: serve("tls11", sock, fin),
                            context(ssl.TLSVersion.TLSv1_1))
    for name, version in (("certificate_tls12", ssl.TLSVersion.TLSv1_2), ("certificate_tls13", ssl.TLSVersion.TLSv1_3)):
        ports[name] = listen(lambda sock, name=name: serve(name, sock, fin), context(version, verify=True))
    print(json.dumps(ports), flush=True)

    for line in sys.stdin:
        if line == "leave\n":
            round_of_leaving += 1
        with lock:
            print(json.dumps(counts), flush=True)
    os._exit(0)     # whatever the connections' threads are doing


if __name__ == "__main__":
    main()
