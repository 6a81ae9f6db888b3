//! Rules of others, as kube-proxy, Docker and an administrator would have them on a node.

use std::fmt::Write as _;

use super::Node;

/// How many Services kube-proxy has.
const SERVICES: u8 = 50;

/// Puts everything in place, with the variant's own iptables.
pub fn install(node: &Node) {
    let script = format!(
        "iptables-restore --noflush <<'END'\n{}END\n\
         ip6tables-restore --noflush <<'END'\n{}END\n\
         nft -f - <<'END'\n{NFT}END\n",
        v4(),
        V6
    );
    node.shell(&script);
}

/// The scaffold that upstream's portmap leaves behind when its last pod has gone.
pub const UPSTREAM_SCAFFOLD: &str = r#"*nat
:CNI-HOSTPORT-DNAT - [0:0]
:CNI-HOSTPORT-MASQ - [0:0]
:CNI-HOSTPORT-SETMARK - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-I POSTROUTING -m comment --comment "CNI portfwd requiring masquerade" -j CNI-HOSTPORT-MASQ
-A CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE
-A CNI-HOSTPORT-SETMARK -m comment --comment "CNI portfwd masquerade mark" -j MARK --set-xmark 0x2000/0x2000
COMMIT
"#;

/// Puts upstream's empty scaffold in place, for both families.
pub fn install_upstream_scaffold(node: &Node) {
    for tool in ["iptables", "ip6tables"] {
        node.shell(&format!("{tool}-restore --noflush <<'END'\n{UPSTREAM_SCAFFOLD}END\n"));
    }
}

/// Has somebody use nft in a table of iptables-nft's, in both families: what is in none of iptables' own
/// words makes `iptables-nft -S` call the whole table incompatible (1.8.9).
pub fn install_unreadable(node: &Node, table: &str) {
    let statement = if table == "nat" { "masquerade" } else { "notrack" };
    for family in ["ip", "ip6"] {
        node.shell(&format!(
            "nft -f - <<'END'
             table {family} {table} {{
                 chain others {{ {statement}; }}
             }}
END
"
        ));
    }
}

fn v4() -> String {
    let mut text = String::from(
        r#"*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
:DOCKER - [0:0]
-I PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-I OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-I POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE
"#,
    );
    for number in 1..=SERVICES {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            ":KUBE-SVC-{number} - [0:0]\n:KUBE-SEP-{number} - [0:0]\n\
             -A KUBE-SERVICES -d 10.96.0.{number}/32 -p tcp -m comment --comment \"default/svc-{number} cluster IP\" -m tcp --dport 80 -j KUBE-SVC-{number}\n\
             -A KUBE-SVC-{number} ! -s 10.244.0.0/16 -d 10.96.0.{number}/32 -p tcp -m tcp --dport 80 -j KUBE-MARK-MASQ\n\
             -A KUBE-SVC-{number} -m comment --comment \"default/svc-{number}\" -j KUBE-SEP-{number}\n\
             -A KUBE-SEP-{number} -s 10.244.1.{number}/32 -j KUBE-MARK-MASQ\n\
             -A KUBE-SEP-{number} -p tcp -m tcp -j DNAT --to-destination 10.244.1.{number}:8080"
        );
    }
    text + r#"-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m comment --comment "default/svc-1" -m tcp --dport 30001 -j KUBE-SVC-1
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 9000 -j DNAT --to-destination 172.17.0.2:80
COMMIT
*filter
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-USER -j RETURN
COMMIT
*raw
-A PREROUTING -d 172.17.0.2/32 ! -i docker0 -j DROP
COMMIT
*mangle
:KUBE-PROXY-CANARY - [0:0]
COMMIT
"#
}

const V6: &str = r#"*nat
:KUBE-POSTROUTING - [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d ::1/128 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -j KUBE-POSTROUTING
-A POSTROUTING -s fd00:17::/64 ! -o docker0 -j MASQUERADE
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
-A INPUT -j KUBE-FIREWALL
COMMIT
"#;

const NFT: &str = r#"table inet others {
	set blocked {
		type ipv4_addr
		elements = { 203.0.113.66, 203.0.113.67 }
	}
	map ports {
		type inet_service : ipv4_addr
		elements = { 9001 : 10.9.9.9 }
	}
	chain input {
		type filter hook input priority 0; policy accept;
		ip saddr @blocked counter drop
	}
	chain prerouting {
		type nat hook prerouting priority -100; policy accept;
		dnat ip to tcp dport map @ports
	}
}
"#;
