use portmap::sys::bpf::program::{Hook, Program, Rejected, SocketHook};

use crate::{classifier, instruction, isolated, returning};

#[test]
#[ignore = "privileged: needs bpf(2)"]
fn programs_are_loaded_named_and_found() {
    isolated(|| {
        let pass = classifier("pm_pass", -1);
        assert_eq!(pass.name(), "pm_pass");
        assert_ne!(pass.tag(), classifier("pm_pass", 2).tag());
        assert_eq!(pass.tag(), classifier("pm_other", -1).tag());
        assert!(pass.map_ids().unwrap().is_empty());
        assert_eq!(Program::from_id(pass.id()).unwrap().unwrap().tag(), pass.tag());
        let path = std::path::Path::new("/sys/fs/bpf/pass");
        assert!(Program::from_pin(path).unwrap().is_none());
        pass.pin(path).unwrap();
        assert_eq!(pass.pin(path).unwrap_err().kind(), std::io::ErrorKind::AlreadyExists);
        let id = pass.id();
        drop(pass);
        assert_eq!(Program::from_pin(path).unwrap().unwrap().id(), id);
        for hook in SocketHook::ALL {
            Program::load(Hook::Socket(hook), "pm_socket", &returning(1), c"GPL").unwrap();
        }
    });
}

#[test]
#[ignore = "privileged: needs bpf(2)"]
fn a_rejected_program_says_why() {
    isolated(|| {
        let exit_only = [instruction(0x95, 0, 0, 0, 0)];
        let error = Program::load(Hook::Classifier, "pm_bad", &exit_only, c"GPL").unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("program pm_bad: Permission denied (os error 13)\n"), "{text}");
        assert!(text.contains("R0 !read_ok"), "{text}");
        let rejected = error.into_inner().unwrap().downcast::<Rejected>().unwrap();
        assert_eq!(rejected.reason.raw_os_error(), Some(libc::EACCES));
    });
}

#[test]
#[ignore = "privileged: needs bpf(2)"]
fn trials_show_verdict_and_packet() {
    isolated(|| {
        let packet: Vec<u8> = (0..60).collect();
        let trial = classifier("pm_shot", 2).test_run(&packet, 0, 0, 1).unwrap();
        assert_eq!((trial.verdict, trial.packet), (2, packet.clone()));
        // r0 = skb->ifindex
        let device = [instruction(0x61, 0, 1, 40, 0), instruction(0x95, 0, 0, 0, 0)];
        let program = Program::load(Hook::Classifier, "pm_device", &device, c"GPL").unwrap();
        let lo = nix::net::if_::if_nametoindex("lo").unwrap();
        assert_eq!(program.test_run(&packet, lo, 0, 3).unwrap().verdict, lo);
        // r0 = skb->ingress_ifindex
        let from = [instruction(0x61, 0, 1, 36, 0), instruction(0x95, 0, 0, 0, 0)];
        let from = Program::load(Hook::Classifier, "pm_from", &from, c"GPL").unwrap();
        assert_eq!(from.test_run(&packet, lo, 7, 1).unwrap().verdict, 7);
        assert!(program.test_run(&packet, 4_000_000, 0, 1).is_err());
        assert!(program.test_run(&packet[..13], 0, 0, 1).is_err());
    });
}
