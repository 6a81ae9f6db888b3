use std::time::Instant;

use portmap::sys::netlink::nftables::{BaseChain, Chain, Element, NftFamily, NftReader};
use portmap::sys::netlink::nftkey::Key;

use crate::{fed, in_namespace, run};

const RULESET: &str = r#"
table inet t {
    map v4ip { type inet_proto . inet_service : ipv4_addr; }
    map v4port { type inet_proto . inet_service : inet_service; }
    map both {
        type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
        elements = { 127.0.0.1 . udp . 53 comment "dns" : 10.0.0.3 . 5353 }
    }
    map six {
        type ipv6_addr . inet_proto . inet_service : verdict
        elements = { 2001:db8::1 . sctp . 9 : jump pod }
    }
    map where { type inet_service : verdict; }
    set ports { type inet_service; elements = { 80 comment "web" } }
    chain pre {
        type nat hook prerouting priority dstnat + 1; policy accept;
        dnat ip to meta l4proto . th dport map @v4ip comment "first"
        counter
        th dport vmap @where comment "third, äöü \ and all"
    }
    chain out { type filter hook output priority -300; policy accept; }
    chain pod { }
    chain empty { }
}
table ip t { chain other { type nat hook postrouting priority srcnat; }; }
add element inet t v4ip { tcp . 8080 comment "pod-1" : 10.0.0.2 }
add element inet t v4port { tcp . 8080 : 80 }
add element inet t where { 443 comment "owner" : goto pod }
"#;

#[test]
#[ignore = "privileged: needs root, network namespaces, nft and conntrack"]
fn nftables_objects_are_read_back() {
    in_namespace(|| {
        fed("nft -f -", RULESET);
        let mut reader = NftReader::open().unwrap();
        assert!(reader.table_exists(NftFamily::Inet, "t").unwrap());
        assert!(reader.table_exists(NftFamily::Ip, "t").unwrap());
        assert!(!reader.table_exists(NftFamily::Ip6, "t").unwrap());
        assert!(!reader.table_exists(NftFamily::Inet, "none").unwrap());

        let base = |name: &str, hook, priority, kind: &str| Chain {
            name: name.into(),
            base: Some(BaseChain { hook, priority, kind: kind.into(), drops: false }),
        };
        let plain = |name: &str| Chain { name: name.into(), base: None };
        let mut chains = reader.chains(NftFamily::Inet, "t").unwrap();
        chains.sort_by(|a, b| a.name.cmp(&b.name));
        assert_eq!(
            chains,
            [
                plain("empty"),
                base("out", 3, -300, "filter"),
                plain("pod"),
                base("pre", 0, -99, "nat")
            ]
        );
        assert_eq!(reader.chains(NftFamily::Ip, "t").unwrap(), [base("other", 4, 100, "nat")]);
        assert!(reader.chains(NftFamily::Inet, "none").unwrap().is_empty());
        for chain in chains {
            let one = reader.chain(NftFamily::Inet, "t", &chain.name).unwrap();
            assert_eq!(one, Some(chain));
        }
        assert_eq!(reader.chain(NftFamily::Inet, "t", "other").unwrap(), None);

        let comments = reader.rule_comments(NftFamily::Inet, "t", "pre").unwrap();
        let expected = [Some("first"), None, Some("third, äöü \\ and all")];
        assert_eq!(comments, expected.map(|comment| comment.map(str::to_owned)));
        for (table, chain) in [("t", "empty"), ("t", "none"), ("none", "pre")] {
            assert!(reader.rule_comments(NftFamily::Inet, table, chain).unwrap().is_empty());
        }
    });
}

#[test]
#[ignore = "privileged: needs root, network namespaces, nft and conntrack"]
fn nftables_elements_are_read_back() {
    in_namespace(|| {
        fed("nft -f -", RULESET);
        let mut reader = NftReader::open().unwrap();
        let mut get =
            |set: &str, key: Key| reader.element(NftFamily::Inet, "t", set, &key.bytes()).unwrap();
        let local = Key::new().v4([127, 0, 0, 1].into());
        let six = Key::new().v6("2001:db8::1".parse().unwrap());
        assert_eq!(
            get("v4ip", Key::new().proto(6).port(8080)),
            Some(Element {
                data: Some(vec![10, 0, 0, 2]),
                goto: None,
                comment: Some("pod-1".into())
            })
        );
        assert_eq!(get("v4ip", Key::new().proto(17).port(8080)), None);
        let port = get("v4port", Key::new().proto(6).port(8080)).unwrap();
        assert_eq!(port.data, Some(Key::new().port(80).bytes()));
        let both = get("both", local.clone().proto(17).port(53)).unwrap();
        let target = Key::new().v4([10, 0, 0, 3].into()).port(5353);
        assert_eq!(both.data, Some(target.bytes()));
        assert_eq!(both.comment.as_deref(), Some("dns"));
        assert_eq!(get("both", local.proto(17).port(54)), None);
        assert_eq!(get("six", six.proto(132).port(9)).unwrap().goto.as_deref(), Some("pod"));
        let verdict = get("where", Key::new().port(443)).unwrap();
        assert_eq!((verdict.goto.as_deref(), verdict.data), (Some("pod"), None));
        assert_eq!(verdict.comment.as_deref(), Some("owner"));
        assert_eq!(get("ports", Key::new().port(80)).unwrap().comment.as_deref(), Some("web"));
        assert_eq!(get("ports", Key::new().port(81)), None);
        assert_eq!(get("none", Key::new().port(80)), None);

        let short = reader.element(NftFamily::Inet, "t", "v4ip", &[6, 0, 0, 0]);
        assert_eq!(short.unwrap_err().raw_os_error(), Some(libc::EINVAL));
    });
}

#[test]
#[ignore = "privileged: needs root, network namespaces, nft and conntrack"]
fn ten_thousand_elements_do_not_slow_a_lookup() {
    in_namespace(|| {
        let key = |port: u16| Key::new().proto(6).port(port).bytes();
        let elements: Vec<String> = (1..=10_000)
            .map(|port| format!("tcp . {port} comment \"pod-{port}\" : 10.0.0.2"))
            .collect();
        let mut ruleset = format!(
            "table inet t {{\nmap m {{ type inet_proto . inet_service : ipv4_addr; elements = {{ {} }} }}\n",
            elements.join(", ")
        );
        for number in 0..1000 {
            ruleset += &format!("chain c{number} {{ counter comment \"of {number}\"; }}\n");
        }
        fed("nft -f -", &(ruleset + "}"));
        let mut reader = NftReader::open().unwrap();
        let keys: Vec<_> = (1..=10_001).map(key).collect();
        let start = Instant::now();
        let found = reader.elements(NftFamily::Inet, "t", "m", &keys).unwrap();
        println!("element: {:?} each", start.elapsed() / 10_001);
        assert_eq!(found.len(), 10_001);
        assert_eq!(found[9_999].as_ref().unwrap().comment.as_deref(), Some("pod-10000"));
        assert_eq!(found[10_000], None);
        let start = Instant::now();
        assert!(reader.chain(NftFamily::Inet, "t", "c500").unwrap().is_some());
        println!("one chain of 1000: {:?}", start.elapsed());
        let start = Instant::now();
        assert_eq!(reader.chains(NftFamily::Inet, "t").unwrap().len(), 1000);
        println!("1000 chains: {:?}", start.elapsed());
        let start = Instant::now();
        let comments = reader.rule_comments(NftFamily::Inet, "t", "c999").unwrap();
        println!("rules of one chain of 1000: {:?}", start.elapsed());
        assert_eq!(comments, [Some("of 999".to_owned())]);
        let start = Instant::now();
        run("nft get element inet t m { tcp . 5000 }");
        println!("nft get element: {:?}", start.elapsed());
    });
}
