use std::cell::Cell;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::path::Path;

use aya_obj::generated::bpf_map_type;
use portmap::demo::netns::Netns;
use portmap::sys::bpf::cgroup::Cgroup;
use portmap::sys::bpf::cookie;
use portmap::sys::bpf::map::Map;
use portmap::sys::bpf::program::{Hook, Program, SocketHook};

use crate::cgroups::Group;
use crate::{INNER, definition, instruction, isolated, once_more};

/// Puts the cookie of the network namespace of whoever connects to 127.255.0.0/16 into the only
/// entry of `map`.
fn teacher(map: &Map) -> Program {
    let fd = map.fd().as_raw_fd();
    let instructions = [
        instruction(0x61, 2, 1, 4, 0), // r2 = ctx->user_ip4
        instruction(0x57, 2, 0, 0, i32::from_ne_bytes([255, 255, 0, 0])), // r2 &= …
        instruction(0x55, 2, 0, 12, i32::from_ne_bytes([127, 255, 0, 0])), // if r2 != … goto out
        instruction(0x85, 0, 0, 0, 122), // r0 = bpf_get_netns_cookie(ctx)
        instruction(0x7b, 10, 0, -16, 0), // value = r0
        instruction(0x62, 10, 0, -4, 0), // key = 0
        instruction(0x18, 1, 1, 0, fd), // r1 = map
        instruction(0, 0, 0, 0, 0),
        instruction(0xbf, 2, 10, 0, 0), // r2 = &key
        instruction(0x07, 2, 0, 0, -4),
        instruction(0xbf, 3, 10, 0, 0), // r3 = &value
        instruction(0x07, 3, 0, 0, -16),
        instruction(0xb7, 4, 0, 0, 0),
        instruction(0x85, 0, 0, 0, 2), // bpf_map_update_elem(r1, r2, r3, 0)
        instruction(0xb7, 0, 0, 0, 0),
        instruction(0xb7, 0, 0, 0, 1), // out: return 1
        instruction(0x95, 0, 0, 0, 0),
    ];
    Program::load(Hook::Socket(SocketHook::Connect4), "pm_teacher", &instructions, c"GPL").unwrap()
}

/// In a process of the cgroup.
fn inside(group: &Path) {
    let map = Map::create(&definition("pm", bpf_map_type::BPF_MAP_TYPE_ARRAY, 1)).unwrap();
    let program = teacher(&map);
    assert_eq!(program.map_ids().unwrap(), [map.id()]);
    Cgroup::open(group).unwrap().attach(SocketHook::Connect4, &program).unwrap();
    let learnt = || map.get(&[0; 4]).unwrap().unwrap();
    UdpSocket::bind("0.0.0.0:0").unwrap().connect("127.0.0.1:80").ok();
    assert_eq!(learnt(), [0; 8]);
    let told = Cell::new(None);
    cookie::teach(|address| {
        told.set(Some(address));
        Ok(())
    })
    .unwrap();
    assert_eq!(told.get().unwrap().ip().octets()[..2], [127, 255]);
    // Where the kernel tells processes too, it is the same.
    let cookie = learnt();
    assert_ne!(cookie, [0; 8]);
    if let Some(own) = cookie::own().unwrap() {
        assert_eq!(cookie, own.to_ne_bytes());
    }
    assert!(cookie::teach(|_| Err(std::io::Error::other("no"))).is_err());
}

#[test]
#[ignore = "privileged: needs bpf(2) and cgroup v2"]
fn the_cookie_is_learnt_by_a_connection() {
    if let Some(group) = std::env::var_os(INNER) {
        return inside(Path::new(&group));
    }
    let group = Group::new();
    isolated(|| {
        let path = group.0.to_str().unwrap();
        let enter = format!("echo $$ > {path}/cgroup.procs && exec \"$0\" \"$@\"");
        once_more("cookie::the_cookie_is_learnt_by_a_connection", &["sh", "-c", &enter], path);
    });
}

#[test]
#[ignore = "privileged: needs network namespaces"]
fn network_namespaces_have_different_cookies() {
    let cookie = || Netns::new("cookie").unwrap().run(|| cookie::own().unwrap()).unwrap();
    match (cookie(), cookie()) {
        (None, None) => println!("this kernel does not tell processes"),
        (one, two) => assert!(one.is_some() && two.is_some() && one != two),
    }
}
