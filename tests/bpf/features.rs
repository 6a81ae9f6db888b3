use portmap::sys::bpf::cookie;
use portmap::sys::bpf::features::Features;

use crate::{isolated, kernel, run};

/// Only what every kernel has that these tests run on is known beforehand.
#[test]
#[ignore = "privileged: needs bpf(2) and network namespaces"]
fn what_a_probe_finds_is_so_and_leaves_nothing() {
    isolated(|| {
        let found = Features::probe().unwrap();
        let version = kernel();
        assert!(found.tcx || version < (6, 6));
        assert!(found.clsact);
        assert!(found.cookie_helper || version < (5, 7));
        assert!(found.cookie_option || version < (5, 14));
        assert!(found.batches && found.cgroup_replace || version < (5, 6));
        assert!(found.getpeername || version < (5, 8));
        assert_eq!(found.no_socket_hooks, None);
        assert_eq!(found.cookie_option, cookie::own().unwrap().is_some());

        assert!(!run("tc qdisc show dev lo").contains("clsact"));
        let text = serde_json::to_string(&found).unwrap();
        assert_eq!(serde_json::from_str::<Features>(&text).unwrap(), found);
    });
}
