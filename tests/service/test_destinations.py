"""Where webhooks may go: every way to write or to resolve to an address that is not public is refused."""

import asyncio
import socket

import pytest

from safegraft.errors import InvalidParameter
from service.destinations import Destinations, Pinned, is_public

PUBLIC = ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "2002:808:808::1", "64:ff9b::808:808"]
NOT_PUBLIC = [
    "127.0.0.1", "127.255.0.3", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "192.88.99.1",
    "::", "::1", "fe80::1", "fe80::1%eth0", "2606:4700::1111%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1",
    "2001:db8::1", "100::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1",
    "::8.8.8.8", "2002:7f00:1::", "2002:a00:1::1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::808:808",
    "2001:0:808:808::1", "8000::1", "", "localhost", "8.8.8", "08.8.8.8",
]  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC)
def test_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/", "ftp://hooks.example.com/", "//hooks.example.com/", "hooks.example.com", "",
        "https://", "https:///path", "https://?x", "https:hooks.example.com", "file:///etc/passwd", "gopher://a:70/",
        "https://user@hooks.example.com/", "https://user:pass@hooks.example.com/", "https://@hooks.example.com/",
        "https://:@hooks.example.com/", "https://hooks.example.com/#x", "https://hooks.example.com/#",
        "https://hooks.example.com\\@127.0.0.1/", "https://127.0.0.1\\.example.com/", "https://a b.example.com/",
        "https://hooks.example.com/a b", "https://hooks.example.com:0/", "https://hooks.example.com:65536/",
        "https://hooks.example.com:x/", "https://[fe80::1%25eth0]/", "https://[::1/", "https://%31%32%37.0.0.1/",
        "https://hooks.example.com:99999999999/", f"https://{'a' * 64}.example.com/", "https://a..example.com/",
    ],
)  # fmt: skip
def test_addresses_of_another_form_are_refused(url: str) -> None:
    with pytest.raises(InvalidParameter) as refused:
        Destinations(allow_private=False).check(url)
    assert refused.value.code == "webhook_url_refused"
    assert refused.value.param == "url"


@pytest.mark.parametrize("found", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::1", "8.8.8.8"], ["::ffff:10.0.0.1"]])
def test_a_name_with_one_address_that_is_not_public_is_refused(found: list[str]) -> None:
    destinations = Destinations(allow_private=False, resolve=lambda name, port: found)
    for ask in (destinations.check, lambda url: asyncio.run(destinations.pin(url))):
        with pytest.raises(InvalidParameter) as refused:
            ask("https://hooks.example.com/")
        assert refused.value.code == "webhook_address_refused"
        assert not any(address in str(refused.value) for address in found)


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST", "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0",
     "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "169.254.169.254",
     "\uff11\uff12\uff17.0.0.1", "127。0。0。1"],
)  # fmt: skip
def test_every_way_to_write_this_machine_is_refused(host: str) -> None:
    """By the system's own resolver, which also understands the old ways to write an IPv4 address."""
    destinations = Destinations(allow_private=False)
    for port in ("", ":443", ":8443"):
        with pytest.raises(InvalidParameter):
            destinations.check(f"https://{host}{port}/")
        with pytest.raises((InvalidParameter, OSError)):
            asyncio.run(destinations.pin(f"https://{host}{port}/"))


def test_the_connection_goes_to_what_was_checked() -> None:
    """A name that resolves to something else the second time has no second time."""
    asked: list[tuple[str, int]] = []

    def resolve(name: str, port: int) -> list[str]:
        asked.append((name, port))
        return [["8.8.8.8", "2606:4700::1111", "8.8.8.8"], ["127.0.0.1"]][len(asked) - 1]

    destinations = Destinations(allow_private=False, resolve=resolve)
    pinned = asyncio.run(destinations.pin("https://Hooks.Example.com.:8443/a%20b?c=d"))
    host, name = "hooks.example.com.:8443", "hooks.example.com"
    assert [(str(p.url), p.host, p.server_name) for p in pinned] == [
        ("https://8.8.8.8:8443/a%20b?c=d", host, name),
        ("https://[2606:4700::1111]:8443/a%20b?c=d", host, name),
    ]
    assert asked == [("hooks.example.com.", 8443)]
    with pytest.raises(InvalidParameter):
        asyncio.run(destinations.pin("https://hooks.example.com/"))
    assert asked[1] == ("hooks.example.com", 443)


def test_names_in_other_letters_are_resolved_and_sent_as_dns_writes_them() -> None:
    asked: list[str] = []

    def resolve(name: str, port: int) -> list[str]:
        asked.append(name)
        return ["8.8.8.8"]

    pinned: list[Pinned] = asyncio.run(
        Destinations(allow_private=False, resolve=resolve).pin("https://bücher.example/")
    )
    assert asked == [pinned[0].host] == [pinned[0].server_name] == ["xn--bcher-kva.example"]


def test_a_name_that_does_not_resolve_may_do_so_later() -> None:
    def resolve(name: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    destinations = Destinations(allow_private=False, resolve=resolve)
    destinations.check("https://hooks.example.com/")
    with pytest.raises(OSError, match="no such name"):
        asyncio.run(destinations.pin("https://hooks.example.com/"))


def test_in_development_private_addresses_and_http_are_allowed() -> None:
    destinations = Destinations(allow_private=True)
    destinations.check("http://127.0.0.1:8000/hook")
    (pinned,) = asyncio.run(destinations.pin("http://127.0.0.1:8000/hook"))
    assert (str(pinned.url), pinned.host) == ("http://127.0.0.1:8000/hook", "127.0.0.1:8000")
    for url in ("ftp://127.0.0.1/", "http://user@127.0.0.1/", "http://127.0.0.1/#x"):
        with pytest.raises(InvalidParameter):
            destinations.check(url)
