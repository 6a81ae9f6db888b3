use std::io;

use nix::mount::umount;
use portmap::sys::bpf::clsact::Clsact;
use portmap::sys::bpf::features::Features;
use portmap::sys::bpf::map::Map;
use portmap::sys::bpf::pins::Pins;
use portmap::sys::bpf::program::{Hook, Program};

use crate::{INNER, isolated, once_more, returning};

fn text<T>(result: io::Result<T>) -> String {
    result.map(drop).unwrap_err().to_string()
}

/// What is said without the capabilities in `without`, in a process that has all others.
fn inside(without: &str) {
    let prefix = "Operation not permitted (os error 1): ";
    let said = |result, expected: &str| assert_eq!(text(result), format!("{prefix}{expected}"));
    let load = || Program::load(Hook::Classifier, "pm", &returning(0), c"GPL").map(drop);
    match without {
        "-bpf,-sys_admin" => {
            let expected = "this process lacks CAP_BPF, or CAP_SYS_ADMIN";
            said(load(), expected);
            said(Features::probe().map(drop), expected);
            said(Map::from_id(1).map(drop), expected);
        }
        "-net_admin" => {
            // CAP_SYS_ADMIN stands for it in bpf(2), and not in rtnetlink.
            load().unwrap();
            let expected = "this process lacks CAP_NET_ADMIN";
            said(Clsact::open().unwrap().ensure(1).map(drop), expected);
        }
        "-net_admin,-sys_admin" => {
            let expected = "this process lacks CAP_NET_ADMIN; this process lacks CAP_SYS_ADMIN";
            said(load(), expected);
            said(Features::probe().map(drop), expected);
        }
        "-sys_admin" => {
            load().unwrap();
            said(Program::from_id(1).map(drop), "this process lacks CAP_SYS_ADMIN");
            let refused = Pins::open().unwrap().create_maps(1, [], |_| Ok(()));
            assert_eq!(
                text(refused.map(drop)),
                format!(
                    "no bpffs is mounted, and none can be mounted at /sys/fs/bpf: {prefix}this process lacks CAP_SYS_ADMIN"
                )
            );
            Features::probe().unwrap();
        }
        other => panic!("{other}"),
    }
}

#[test]
#[ignore = "privileged: needs bpf(2), a mount namespace and setpriv"]
fn what_a_process_lacks_is_named() {
    if let Ok(without) = std::env::var(INNER) {
        return inside(&without);
    }
    isolated(|| {
        while umount("/sys/fs/bpf").is_ok() {}
        for without in ["-bpf,-sys_admin", "-net_admin", "-net_admin,-sys_admin", "-sys_admin"] {
            let test = "refusal::what_a_process_lacks_is_named";
            once_more(test, &["setpriv", "--bounding-set", without], without);
        }
    });
}
