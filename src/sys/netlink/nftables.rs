//! Reading nf_tables (`NETLINK_NETFILTER`) without `nft`, whose listings read a whole ruleset to
//! answer for one element of it. Nothing is written here.

use std::io;

use netlink_packet_core::{DefaultNla, Nla, parse_u32_be, parse_u64_be};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, DataAttribute, ListAttribute, RuleAttribute, SetAttribute, SetElementAttribute,
    SetElementList, TableAttribute,
};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterProtoFamily};
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::attributes::{attributes, find, text};
use super::socket::{Message, NetlinkSocket};
use super::{NFGENMSG_LENGTH, netfilter_kind};
use crate::model::Family;

// linux/netfilter/nf_tables.h
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_HANDLE: u16 = 3;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_RULE_USERDATA: u16 = 7;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFTA_SET_TABLE: u16 = 1;
const NFTA_SET_NAME: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_SET_ELEM_USERDATA: u16 = 6;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CHAIN: u16 = 2;
/// NFTNL_UDATA_RULE_COMMENT and NFTNL_UDATA_SET_ELEM_COMMENT: user data is opaque to the kernel,
/// and this is how libnftnl writes it.
const UDATA_COMMENT: u8 = 0;

/// The family of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NftFamily {
    Inet,
    Ip,
    Ip6,
    /// What devices take in or send out.
    Netdev,
}

/// The family of a table that holds one family's rules.
impl From<Family> for NftFamily {
    fn from(family: Family) -> Self {
        match family {
            Family::V4 => NftFamily::Ip,
            Family::V6 => NftFamily::Ip6,
        }
    }
}

/// A chain of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    pub name: String,
    /// `None` if nothing but jumps leads here.
    pub base: Option<BaseChain>,
}

/// Where and when packets enter a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseChain {
    /// `NF_INET_*`: 0 prerouting, 1 input, 2 forward, 3 output, 4 postrouting, 5 ingress; of family netdev
    /// 0 ingress, 1 egress.
    pub hook: u32,
    /// Lower ones come first.
    pub priority: i32,
    /// "nat", "filter" or "route".
    pub kind: String,
    /// What reaches its end is dropped.
    pub drops: bool,
}

/// An element of a set or map.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Element {
    /// The value in a map, in the form of [`super::nftkey::Key::bytes`].
    pub data: Option<Vec<u8>>,
    /// The chain that a verdict map jumps or goes to.
    pub goto: Option<String>,
    pub comment: Option<String>,
}

/// Reads the nf_tables of the network namespace of the thread that opened it. Every question is
/// answered from one generation of the ruleset; two questions may see two generations.
pub struct NftReader {
    socket: NetlinkSocket,
}

impl NftReader {
    /// # Errors
    ///
    /// What making the socket returned.
    pub fn open() -> io::Result<Self> {
        let socket = NetlinkSocket::open(NETLINK_NETFILTER)?;
        Ok(Self { socket })
    }

    /// # Errors
    ///
    /// As [`NetlinkSocket::request`]: EINVAL without nf_tables in the kernel, EPERM without
    /// CAP_NET_ADMIN. This holds for all methods.
    pub fn table_exists(&mut self, family: NftFamily, table: &str) -> io::Result<bool> {
        let name = TableAttribute::Name(table.to_owned());
        let request = message(libc::NFT_MSG_GETTABLE, family, &[name]);
        let found = self.get(&request, libc::NFT_MSG_NEWTABLE, |_| Some(()))?;
        Ok(found.is_some())
    }

    /// All chains of a table; none if the table does not exist. The kernel goes through the chains
    /// of every table of the family for this; [`NftReader::chain`] does not.
    pub fn chains(&mut self, family: NftFamily, table: &str) -> io::Result<Vec<Chain>> {
        let mut all = self.all_chains(family)?;
        all.retain(|(of, _)| of == table);
        Ok(all.into_iter().map(|(_, chain)| chain).collect())
    }

    /// The chains of every table of a family, with the names of their tables.
    pub fn all_chains(&mut self, family: NftFamily) -> io::Result<Vec<(String, Chain)>> {
        let request = message::<DefaultNla>(libc::NFT_MSG_GETCHAIN, family, &[]);
        let new = netfilter_kind(libc::NFNL_SUBSYS_NFTABLES, libc::NFT_MSG_NEWCHAIN);
        self.socket.dump(&request, |kind, payload| {
            let rest = payload.get(NFGENMSG_LENGTH..).filter(|_| kind == new)?;
            Some((text(find(rest, NFTA_CHAIN_TABLE)?), chain(rest)?))
        })
    }

    /// One chain, in constant time; `None` if it or the table does not exist.
    pub fn chain(
        &mut self,
        family: NftFamily,
        table: &str,
        name: &str,
    ) -> io::Result<Option<Chain>> {
        let names =
            [ChainAttribute::Table(table.to_owned()), ChainAttribute::Name(name.to_owned())];
        let request = message(libc::NFT_MSG_GETCHAIN, family, &names);
        self.get(&request, libc::NFT_MSG_NEWCHAIN, chain)
    }

    /// The comment of every rule of a chain, in the order of the rules, `None` for a rule without
    /// one. Empty if the chain or the table does not exist.
    pub fn rule_comments(
        &mut self,
        family: NftFamily,
        table: &str,
        chain: &str,
    ) -> io::Result<Vec<Option<String>>> {
        self.rules(family, table, chain, |rule| find(rule, NFTA_RULE_USERDATA).and_then(comment))
    }

    /// Handle and comment of every rule of a chain, in the order of the rules; an empty comment for none.
    pub fn rule_owners(
        &mut self,
        family: NftFamily,
        table: &str,
        chain: &str,
    ) -> io::Result<Vec<(u64, String)>> {
        let decode = |rule: &[u8]| {
            let handle = parse_u64_be(find(rule, NFTA_RULE_HANDLE)?).ok()?;
            let comment = find(rule, NFTA_RULE_USERDATA).and_then(comment);
            Some((handle, comment.unwrap_or_default()))
        };
        let rules = self.rules(family, table, chain, decode)?;
        Ok(rules.into_iter().flatten().collect())
    }

    /// The chain that every rule of a chain leads to, in the order of the rules, `None` for a rule
    /// with another end. Empty if the chain or the table does not exist.
    pub fn rule_jumps(
        &mut self,
        family: NftFamily,
        table: &str,
        chain: &str,
    ) -> io::Result<Vec<Option<String>>> {
        self.rules(family, table, chain, jump)
    }

    fn rules<T>(
        &mut self,
        family: NftFamily,
        table: &str,
        chain: &str,
        mut decode: impl FnMut(&[u8]) -> T,
    ) -> io::Result<Vec<T>> {
        let names =
            [RuleAttribute::Table(table.to_owned()), RuleAttribute::Chain(chain.to_owned())];
        let request = message(libc::NFT_MSG_GETRULE, family, &names);
        let new = netfilter_kind(libc::NFNL_SUBSYS_NFTABLES, libc::NFT_MSG_NEWRULE);
        self.socket.dump(&request, |kind, payload| {
            let rest = payload.get(NFGENMSG_LENGTH..)?;
            // Linux before 4.10 sends the rules of every chain.
            let ours = kind == new
                && named(rest, NFTA_RULE_TABLE, table)
                && named(rest, NFTA_RULE_CHAIN, chain);
            ours.then(|| decode(rest))
        })
    }

    /// Looks one key up in a set or map, in constant time; `None` if the element, the set or the
    /// table does not exist. For the form of `key` see [`super::nftkey::Key`]; one of the wrong
    /// length is refused with EINVAL.
    pub fn element(
        &mut self,
        family: NftFamily,
        table: &str,
        set: &str,
        key: &[u8],
    ) -> io::Result<Option<Element>> {
        let request = element_request(family, table, set, key);
        self.get(&request, libc::NFT_MSG_NEWSETELEM, element)
    }

    /// [`NftReader::element`] for many keys, in their order.
    pub fn elements(
        &mut self,
        family: NftFamily,
        table: &str,
        set: &str,
        keys: &[Vec<u8>],
    ) -> io::Result<Vec<Option<Element>>> {
        keys.iter().map(|key| self.element(family, table, set, key)).collect()
    }

    /// The names of all sets and maps of a table; none if the table does not exist.
    pub fn sets(&mut self, family: NftFamily, table: &str) -> io::Result<Vec<String>> {
        let request =
            message(libc::NFT_MSG_GETSET, family, &[SetAttribute::Table(table.to_owned())]);
        let new = netfilter_kind(libc::NFNL_SUBSYS_NFTABLES, libc::NFT_MSG_NEWSET);
        let sets = self.socket.dump(&request, |kind, payload| {
            let rest = payload.get(NFGENMSG_LENGTH..).filter(|_| kind == new)?;
            named(rest, NFTA_SET_TABLE, table).then(|| find(rest, NFTA_SET_NAME).map(text))?
        });
        none_if_absent(sets)
    }

    /// All elements of a set or map with their keys, whose form is that of [`super::nftkey::Key`]; none if
    /// the set or the table does not exist.
    pub fn all_elements(
        &mut self,
        family: NftFamily,
        table: &str,
        set: &str,
    ) -> io::Result<Vec<(Vec<u8>, Element)>> {
        let names = [SetElementList::Table(table.to_owned()), SetElementList::Set(set.to_owned())];
        let request = message(libc::NFT_MSG_GETSETELEM, family, &names);
        let new = netfilter_kind(libc::NFNL_SUBSYS_NFTABLES, libc::NFT_MSG_NEWSETELEM);
        let lists = self.socket.dump(&request, |kind, payload| {
            let rest = payload.get(NFGENMSG_LENGTH..).filter(|_| kind == new)?;
            Some(listed(rest).map(keyed).collect::<Vec<_>>())
        });
        Ok(none_if_absent(lists)?.into_iter().flatten().flatten().collect())
    }

    /// Asks for one object. `decode` gets the attributes of the answer.
    fn get<T>(
        &mut self,
        request: &Message,
        answer: libc::c_int,
        mut decode: impl FnMut(&[u8]) -> Option<T>,
    ) -> io::Result<Option<T>> {
        let answer = netfilter_kind(libc::NFNL_SUBSYS_NFTABLES, answer);
        let found = self.socket.request(request, 0, |kind, payload| {
            (kind == answer).then(|| decode(payload.get(NFGENMSG_LENGTH..)?))?
        });
        match found {
            Ok(found) => Ok(found.into_iter().next()),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn message<N: Nla>(kind: libc::c_int, family: NftFamily, attributes: &[N]) -> Message {
    let family = match family {
        NftFamily::Inet => NetfilterProtoFamily::Inet,
        NftFamily::Ip => NetfilterProtoFamily::IPv4,
        NftFamily::Ip6 => NetfilterProtoFamily::IPv6,
        NftFamily::Netdev => NetfilterProtoFamily::NetDev,
    };
    let kind = netfilter_kind(libc::NFNL_SUBSYS_NFTABLES, kind);
    Message::new(kind, &NetfilterHeader::new(family, 0, 0), attributes)
}

fn element_request(family: NftFamily, table: &str, set: &str, key: &[u8]) -> Message {
    let key = SetElementAttribute::Key(DataAttribute::Value(key.to_vec()));
    let attributes = [
        SetElementList::Table(table.to_owned()),
        SetElementList::Set(set.to_owned()),
        SetElementList::Elements(vec![ListAttribute::Element(vec![key])]),
    ];
    message(libc::NFT_MSG_GETSETELEM, family, &attributes)
}

fn named(attributes: &[u8], kind: u16, name: &str) -> bool {
    find(attributes, kind).is_some_and(|found| text(found) == name)
}

fn chain(attributes: &[u8]) -> Option<Chain> {
    let number = |bytes, kind| parse_u32_be(find(bytes, kind)?).ok();
    let base = find(attributes, NFTA_CHAIN_HOOK).and_then(|hook| {
        Some(BaseChain {
            hook: number(hook, NFTA_HOOK_HOOKNUM)?,
            priority: number(hook, NFTA_HOOK_PRIORITY)?.cast_signed(),
            kind: find(attributes, NFTA_CHAIN_TYPE).map(text).unwrap_or_default(),
            // NF_DROP; without the attribute it is the default, which is to accept.
            drops: number(attributes, NFTA_CHAIN_POLICY) == Some(0),
        })
    });
    Some(Chain { name: text(find(attributes, NFTA_CHAIN_NAME)?), base })
}

fn none_if_absent<T>(found: io::Result<Vec<T>>) -> io::Result<Vec<T>> {
    match found {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Vec::new()),
        other => other,
    }
}

/// The elements of a message, each as its attributes.
fn listed(message: &[u8]) -> impl Iterator<Item = &[u8]> {
    let list = find(message, NFTA_SET_ELEM_LIST_ELEMENTS).unwrap_or_default();
    attributes(list).filter(|(kind, _)| *kind == NFTA_LIST_ELEM).map(|(_, element)| element)
}

fn element(message: &[u8]) -> Option<Element> {
    listed(message).next().map(one_element)
}

fn keyed(element: &[u8]) -> Option<(Vec<u8>, Element)> {
    let key = find(find(element, NFTA_SET_ELEM_KEY)?, NFTA_DATA_VALUE)?;
    Some((key.to_vec(), one_element(element)))
}

fn one_element(element_attributes: &[u8]) -> Element {
    let mut element = Element::default();
    for (kind, value) in attributes(element_attributes) {
        match kind {
            NFTA_SET_ELEM_DATA => {
                element.data = find(value, NFTA_DATA_VALUE).map(<[u8]>::to_vec);
                element.goto = find(value, NFTA_DATA_VERDICT)
                    .and_then(|verdict| find(verdict, NFTA_VERDICT_CHAIN))
                    .map(text);
            }
            NFTA_SET_ELEM_USERDATA => element.comment = comment(value),
            _ => {}
        }
    }
    element
}

/// A jump is an immediate expression that loads a verdict.
fn jump(rule: &[u8]) -> Option<String> {
    let expressions = find(rule, NFTA_RULE_EXPRESSIONS)?;
    attributes(expressions).find_map(|(_, expression)| {
        let data = find(find(expression, NFTA_EXPR_DATA)?, NFTA_IMMEDIATE_DATA)?;
        find(find(data, NFTA_DATA_VERDICT)?, NFTA_VERDICT_CHAIN).map(text)
    })
}

/// User data is a sequence of type, length and value, with one byte each for the first two.
fn comment(mut userdata: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = userdata {
        let (value, behind) = rest.split_at_checked(usize::from(*length))?;
        if *kind == UDATA_COMMENT {
            return Some(text(value));
        }
        userdata = behind;
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use super::*;
    use netlink_packet_core::{Emitable, NLA_F_NESTED};

    fn nla(kind: u16, value: &[u8]) -> Vec<u8> {
        let nla = DefaultNla::new(kind, value.to_vec());
        let mut bytes = vec![0; nla.buffer_len()];
        nla.emit(&mut bytes);
        bytes
    }

    #[test]
    fn an_element_request() {
        let request = element_request(NftFamily::Inet, "t", "map", &[6, 0, 0, 0, 0x1f, 0x90, 0, 0]);
        assert_eq!(
            request.payload(),
            [
                1, 0, 0, 0, // nfgenmsg
                6, 0, 1, 0, b't', 0, 0, 0, // NFTA_SET_ELEM_LIST_TABLE
                8, 0, 2, 0, b'm', b'a', b'p', 0, // NFTA_SET_ELEM_LIST_SET
                24, 0, 3, 0x80, // NFTA_SET_ELEM_LIST_ELEMENTS
                20, 0, 1, 0x80, // NFTA_LIST_ELEM
                16, 0, 1, 0x80, // NFTA_SET_ELEM_KEY
                12, 0, 1, 0, 6, 0, 0, 0, 0x1f, 0x90, 0, 0,
            ]
        );
    }

    fn answer(attributes: &[Vec<u8>]) -> Vec<u8> {
        let list = nla(NFTA_LIST_ELEM | NLA_F_NESTED, &attributes.concat());
        nla(NFTA_SET_ELEM_LIST_ELEMENTS | NLA_F_NESTED, &list)
    }

    #[test]
    fn elements_of_sets_maps_and_verdict_maps() {
        let key = nla(1 | NLA_F_NESTED, &nla(NFTA_DATA_VALUE, &[0, 80]));
        assert_eq!(element(&answer(std::slice::from_ref(&key))), Some(Element::default()));

        let data = nla(NFTA_SET_ELEM_DATA, &nla(NFTA_DATA_VALUE, &[10, 0, 0, 2]));
        let comment = nla(NFTA_SET_ELEM_USERDATA, b"\x00\x04pod\0");
        let found = element(&answer(&[key.clone(), data, comment])).unwrap();
        assert_eq!(found.data.as_deref(), Some(&[10, 0, 0, 2][..]));
        assert_eq!(found.comment.as_deref(), Some("pod"));
        assert_eq!(found.goto, None);

        let code = nla(1, &(-4_i32).to_be_bytes());
        let verdict = [code, nla(NFTA_VERDICT_CHAIN, b"pod-1\0")].concat();
        let data = nla(NFTA_SET_ELEM_DATA, &nla(NFTA_DATA_VERDICT, &verdict));
        let found = element(&answer(&[key, data])).unwrap();
        assert_eq!((found.goto.as_deref(), found.data), (Some("pod-1"), None));

        assert_eq!(element(b""), None);
    }

    #[test]
    fn a_message_of_a_dump_has_several_elements() {
        let key = |port: u8| nla(1 | NLA_F_NESTED, &nla(NFTA_DATA_VALUE, &[0, port]));
        let comment = nla(NFTA_SET_ELEM_USERDATA, b"\x00\x04pod\0");
        let elements = [[key(80), comment].concat(), key(81)];
        let list = elements.map(|element| nla(NFTA_LIST_ELEM | NLA_F_NESTED, &element)).concat();
        let message = nla(NFTA_SET_ELEM_LIST_ELEMENTS | NLA_F_NESTED, &list);
        let found: Vec<_> = listed(&message).filter_map(keyed).collect();
        let named = Element { comment: Some("pod".into()), ..Element::default() };
        assert_eq!(found, [(vec![0, 80], named), (vec![0, 81], Element::default())]);
        assert_eq!(listed(b"").count(), 0);
    }

    #[test]
    fn base_chains_have_a_hook() {
        let hook = [nla(1, &[0, 0, 0, 4]), nla(2, &(-99_i32).to_be_bytes())].concat();
        let name = nla(NFTA_CHAIN_NAME, b"post\0");
        let kind = nla(NFTA_CHAIN_TYPE, b"nat\0");
        let base = [name.clone(), nla(NFTA_CHAIN_HOOK | NLA_F_NESTED, &hook), kind].concat();
        assert_eq!(
            chain(&base),
            Some(Chain {
                name: "post".into(),
                base: Some(BaseChain { hook: 4, priority: -99, kind: "nat".into(), drops: false })
            })
        );
        assert_eq!(chain(&name).unwrap().base, None);
        assert_eq!(chain(b""), None);
    }

    #[test]
    fn comments_stand_among_other_user_data() {
        assert_eq!(comment(b"\x00\x02a\0").as_deref(), Some("a"));
        assert_eq!(comment(b"\x01\x01x\x00\x02a\0").as_deref(), Some("a"));
        assert_eq!(comment(b"\x01\x01x"), None);
        assert_eq!(comment(b"\x00\x09a\0"), None);
        assert_eq!(comment(b""), None);
    }
}
