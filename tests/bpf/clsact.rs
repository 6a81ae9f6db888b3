use portmap::sys::bpf::Direction;
use portmap::sys::bpf::clsact::{Clsact, Filter, Slot};
use portmap::sys::bpf::program::Program;

use crate::{classifier, isolated, run, veth};

const OURS: Slot = Slot { priority: 1, handle: 0x706d };

fn tc(words: &[&str]) {
    assert!(std::process::Command::new("tc").args(words).status().unwrap().success());
}

fn programs(clsact: &mut Clsact, device: u32, direction: Direction) -> Vec<Option<u32>> {
    let filters = clsact.filters(device, direction).unwrap();
    filters.into_iter().map(|filter| filter.program).collect()
}

#[test]
#[ignore = "privileged: needs bpf(2) and network namespaces"]
fn filters_come_and_go_with_the_qdisc() {
    isolated(|| {
        let device = veth();
        let mut clsact = Clsact::open().unwrap();
        let (old, new) = (classifier("pm_in", -1), classifier("pm_in", -1));
        for direction in Direction::ALL {
            assert_eq!(clsact.filters(device, direction).unwrap(), []);
            assert!(clsact.put(device, direction, OURS, "pm_in", &old).is_err());
            assert!(!clsact.remove(device, direction, OURS).unwrap());
        }
        assert!(!clsact.remove_unused(device).unwrap());
        assert!(clsact.ensure(device).unwrap());
        assert!(!clsact.ensure(device).unwrap());
        for direction in Direction::ALL {
            assert_eq!(clsact.filters(device, direction).unwrap(), []);
            clsact.put(device, direction, OURS, "pm_in", &old).unwrap();
            let filter = Filter {
                slot: OURS,
                protocol: 3,
                kind: "bpf".into(),
                name: Some("pm_in".into()),
                program: Some(old.id()),
            };
            assert_eq!(clsact.filters(device, direction).unwrap(), [filter]);
            clsact.put(device, direction, OURS, "pm_in", &new).unwrap();
            assert_eq!(programs(&mut clsact, device, direction), [Some(new.id())]);
            assert!(!clsact.remove_unused(device).unwrap());
        }
        assert!(run("tc filter show dev pm0 ingress").contains("direct-action"));
        assert!(clsact.remove(device, Direction::Ingress, OURS).unwrap());
        assert!(!clsact.remove(device, Direction::Ingress, OURS).unwrap());
        assert!(!clsact.remove_unused(device).unwrap());
        assert!(clsact.remove(device, Direction::Egress, OURS).unwrap());
        assert!(clsact.remove_unused(device).unwrap());
        assert!(!run("tc qdisc show dev pm0").contains("clsact"));
    });
}

#[test]
#[ignore = "privileged: needs bpf(2) and network namespaces"]
fn the_order_of_several_filters() {
    isolated(|| {
        let device = veth();
        let mut clsact = Clsact::open().unwrap();
        clsact.ensure(device).unwrap();
        let [ours, newer, before, beside] =
            ["pm_a", "pm_b", "before", "beside"].map(|name| classifier(name, -1));
        let ingress = Direction::Ingress;
        let slot = |priority, handle| Slot { priority, handle };
        clsact.put(device, ingress, slot(2, 1), "pm", &ours).unwrap();
        clsact.put(device, ingress, slot(2, 7), "beside", &beside).unwrap();
        clsact.put(device, ingress, slot(1, 1), "before", &before).unwrap();
        // A classic program, which has no id.
        tc(&[
            "filter",
            "add",
            "dev",
            "pm0",
            "ingress",
            "prio",
            "3",
            "protocol",
            "ip",
            "bpf",
            "bytecode",
            "1,6 0 0 0",
        ]);
        let order = |first: &Program| {
            [Some(before.id()), Some(beside.id()), Some(first.id()), None].to_vec()
        };
        assert_eq!(programs(&mut clsact, device, ingress), order(&ours));
        // Replacing keeps the place.
        clsact.put(device, ingress, slot(2, 1), "pm", &newer).unwrap();
        assert_eq!(programs(&mut clsact, device, ingress), order(&newer));
        let filters = clsact.filters(device, ingress).unwrap();
        assert_eq!((filters[3].kind.as_str(), filters[3].protocol), ("bpf", 0x0800));
        assert_eq!(programs(&mut clsact, device, Direction::Egress), []);
        // The priority is of another protocol.
        assert!(clsact.put(device, ingress, slot(3, 1), "pm", &ours).is_err());
        assert!(!clsact.remove(device, ingress, slot(3, 1)).unwrap());
        assert!(clsact.remove(device, ingress, slot(2, 1)).unwrap());
        assert_eq!(clsact.filters(device, ingress).unwrap().len(), 3);
        assert!(!clsact.remove_unused(device).unwrap());
    });
}

#[test]
#[ignore = "privileged: needs bpf(2) and network namespaces"]
fn an_ingress_qdisc_leaves_no_room() {
    isolated(|| {
        let device = veth();
        run("tc qdisc add dev pm0 ingress");
        let mut clsact = Clsact::open().unwrap();
        let refused = clsact.ensure(device).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EBUSY));
        run("tc qdisc del dev pm0 ingress");
        assert!(clsact.ensure(device).unwrap());
    });
}

#[test]
#[ignore = "privileged: needs bpf(2) and network namespaces"]
fn nothing_stays_of_a_device_that_is_gone() {
    isolated(|| {
        let device = veth();
        let program = classifier("pm_gone", -1);
        let id = program.id();
        let mut clsact = Clsact::open().unwrap();
        clsact.ensure(device).unwrap();
        clsact.put(device, Direction::Egress, OURS, "pm_gone", &program).unwrap();
        drop(program);
        assert!(Program::from_id(id).unwrap().is_some());
        run("ip link del pm0");
        let gone = Some(libc::ENODEV);
        assert_eq!(clsact.ensure(device).unwrap_err().raw_os_error(), gone);
        assert_eq!(clsact.filters(device, Direction::Egress).unwrap(), []);
        assert!(!clsact.remove(device, Direction::Egress, OURS).unwrap());
        assert!(!clsact.remove_unused(device).unwrap());
        // The kernel lets go of it in a while.
        while Program::from_id(id).unwrap().is_some() {
            std::thread::yield_now();
        }
    });
}

/// The kernel makes room for a page of answers at first.
#[test]
#[ignore = "privileged: needs bpf(2) and network namespaces"]
fn a_filter_larger_than_a_page_is_listed() {
    isolated(|| {
        let device = veth();
        let mut clsact = Clsact::open().unwrap();
        clsact.ensure(device).unwrap();
        let length = 1000;
        let code = format!("{length},{}6 0 0 0,", "0 0 0 0,".repeat(length - 1));
        let file = std::env::temp_dir().join(format!("portmap-bytecode-{}", std::process::id()));
        std::fs::write(&file, code).unwrap();
        run(&format!("tc filter add dev pm0 ingress prio 1 bpf bytecode-file {}", file.display()));
        std::fs::remove_file(file).unwrap();
        tc(&[
            "filter",
            "add",
            "dev",
            "pm0",
            "ingress",
            "prio",
            "2",
            "bpf",
            "bytecode",
            "1,6 0 0 0",
        ]);
        for _ in 0..2 {
            let filters = clsact.filters(device, Direction::Ingress).unwrap();
            let kinds: Vec<&str> = filters.iter().map(|filter| filter.kind.as_str()).collect();
            assert_eq!(kinds, ["bpf", "bpf"]);
        }
    });
}
