//! Address: whom a request comes from, as far as an address tells.
//!
//! Promise: a client cannot choose the address that it counts as: what `X-Forwarded-For` says is heard from a configured proxy only.
//! Not here, on purpose: `Forwarded` (RFC 7239), and trust in anybody by default.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use axum::http::HeaderMap;
use ipnet::IpNet;

const X_FORWARDED_FOR: &str = "x-forwarded-for";
/// Whoever has one address of IPv6 has all of its network.
const IPV6_NETWORK: u128 = !0 << 64;

/// The proxies whose `X-Forwarded-For` is heard.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Proxies(Vec<IpNet>);

impl Proxies {
    /// Addresses and networks, such as `10.0.0.0/8`.
    ///
    /// # Errors
    /// When one is none.
    pub fn parse(list: &[String]) -> Result<Self, &'static str> {
        let network = |text: &String| {
            let address = text.parse::<IpAddr>().map(IpNet::from).ok();
            address.or_else(|| text.parse().ok()).ok_or("expected addresses or networks, such as 10.0.0.0/8,192.0.2.7")
        };
        list.iter().map(network).collect::<Result<_, _>>().map(Self)
    }

    fn trust(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(&address))
    }

    /// The client, as its own peer or the last proxy before us that is not ours saw it. Of IPv6 its network.
    pub fn client(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let mut client = peer.to_canonical();
        let lines = headers.get_all(X_FORWARDED_FOR);
        let entries = lines.iter().rev().flat_map(|line| line.to_str().unwrap_or_default().rsplit(','));
        for entry in entries {
            if !self.trust(client) {
                break;
            }
            let Some(before) = parse(entry.trim()) else { break };
            client = before.to_canonical();
        }
        network(client)
    }
}

/// An address, with or without a port; IPv6 with a port is in brackets.
fn parse(entry: &str) -> Option<IpAddr> {
    let bare = entry.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(entry);
    bare.parse().ok().or_else(|| entry.parse::<SocketAddr>().ok().map(|socket| socket.ip()))
}

fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & IPV6_NETWORK).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(proxies: &[&str], peer: &str, forwarded: &[&str]) -> String {
        let list: Vec<String> = proxies.iter().map(|text| (*text).to_owned()).collect();
        let headers = forwarded.iter().map(|line| (X_FORWARDED_FOR.parse().unwrap(), line.parse().unwrap()));
        Proxies::parse(&list).unwrap().client(peer.parse().unwrap(), &headers.collect()).to_string()
    }

    #[test]
    fn nobody_is_believed_who_is_not_configured() {
        assert_eq!(client(&[], "192.0.2.7", &["198.51.100.1"]), "192.0.2.7");
        assert_eq!(client(&["10.0.0.0/8"], "192.0.2.7", &["10.0.0.1, 10.0.0.2"]), "192.0.2.7");
    }

    #[test]
    fn a_proxy_is_believed_about_its_own_peer_and_no_further() {
        let ours = ["10.0.0.0/8", "2001:db8::1"];
        assert_eq!(client(&ours, "10.0.0.1", &["198.51.100.1"]), "198.51.100.1");
        assert_eq!(client(&ours, "10.0.0.1", &["1.1.1.1, 198.51.100.1"]), "198.51.100.1", "the rest is hearsay");
        assert_eq!(client(&ours, "10.0.0.1", &["1.1.1.1", "198.51.100.1,10.0.0.2"]), "198.51.100.1", "two proxies");
        assert_eq!(client(&ours, "2001:db8::1", &["198.51.100.1:4711"]), "198.51.100.1");
        assert_eq!(client(&ours, "10.0.0.1", &["1.1.1.1, what"]), "10.0.0.1");
        assert_eq!(client(&ours, "10.0.0.1", &[]), "10.0.0.1");
        assert_eq!(client(&ours, "::ffff:10.0.0.1", &["::ffff:198.51.100.1"]), "198.51.100.1");
    }

    #[test]
    fn a_network_of_ipv6_is_one_client() {
        assert_eq!(client(&[], "2001:db8:1:2:3:4:5:6", &[]), "2001:db8:1:2::");
        assert_eq!(client(&["::1"], "::1", &["[2001:db8:1:2:3::6]:80"]), "2001:db8:1:2::");
    }

    #[test]
    fn what_is_no_address_is_refused() {
        assert!(Proxies::parse(&["10.0.0.0/33".to_owned()]).is_err());
        assert!(Proxies::parse(&["proxy.example.org".to_owned()]).is_err());
    }
}
