from __future__ import annotations

from ipaddress import IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from container.addresses import SPECIAL_V4, SPECIAL_V6, UNICAST_V6, is_public

PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "52.216.10.1",
    "100.63.255.255",
    "100.128.0.0",
    "126.255.255.255",
    "128.0.0.0",
    "168.63.129.15",
    "169.253.255.255",
    "169.255.0.0",
    "172.15.255.255",
    "172.32.0.0",
    "192.167.255.255",
    "192.169.0.0",
    "223.255.255.255",
    "2606:4700:4700::1111",
    "2a00:1450:4001:80b::200e",
    "2001:4860:4860::8888",
    "2600:9000::1",
]
NOT_PUBLIC = [
    "0.0.0.0",
    "10.0.0.5",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.255",
    "168.63.129.16",
    "169.254.169.254",
    "169.254.170.2",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.31.196.1",
    "192.52.193.1",
    "192.88.99.1",
    "192.168.1.1",
    "192.175.48.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.7",
    "203.0.113.7",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:8.8.8.8",
    "64:ff9b::7f00:1",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::1",
    "2620:4f:8000::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fec0::1",
    "ff02::1",
]
NO_ADDRESS = [
    "",
    "example.com",
    "2130706433",
    "0x7f000001",
    "0177.0.0.1",
    "010.0.0.1",
    "127.1",
    "0",
    "1.1.1.1\n",
    " 1.1.1.1",
    "1.1.1.1/32",
    "[2606:4700::1111]",
    "fe80::1%eth0",
    "2606:4700:4700::1111%eth0",
    "\u0661.1.1.1",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_a_host_on_the_internet_is_public(address):
    assert is_public(address)


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_a_special_address_is_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("text", NO_ADDRESS)
def test_what_is_no_address_is_not_public(text):
    assert not is_public(text)


@pytest.mark.parametrize("network", SPECIAL_V4 + SPECIAL_V6, ids=str)
def test_the_first_and_last_address_of_every_special_range_are_refused(network):
    assert not is_public(str(network[0]))
    assert not is_public(str(network[-1]))


def test_the_corpus_has_an_address_of_every_special_range():
    for network in SPECIAL_V4 + SPECIAL_V6:
        assert any(ip_address(address) in network for address in NOT_PUBLIC), network


@given(st.integers(0, 2**128 - 1).map(IPv6Address))
def test_no_ipv6_address_outside_global_unicast_is_public(address):
    assert address in UNICAST_V6 or not is_public(str(address))


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_mapped_into_ipv6_is_never_public(address):
    assert not is_public(f"::ffff:{address}")
