"""Who can reach a process: the addresses that it and its descendants listen at."""

from ipaddress import IPv6Address, ip_address

import psutil


def listening(process: psutil.Process) -> dict[str, set[str]]:
    """Names of the processes by address, among a process and its descendants."""
    names = {found.pid: found.name() for found in [process, *process.children(recursive=True)]}
    found: dict[str, set[str]] = {}
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.pid in names:
            found.setdefault(connection.laddr.ip, set()).add(names[connection.pid])
    return found


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches it."""
    found = ip_address(address)
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return found.is_loopback


def beyond_loopback(process: psutil.Process) -> dict[str, set[str]]:
    """Find the addresses of a process that other machines can reach; it listens at all."""
    found = listening(process)
    assert found, f"{process} listens nowhere"
    return {address: names for address, names in found.items() if not is_loopback(address)}
