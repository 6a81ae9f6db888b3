use std::io::ErrorKind;

use portmap::sys::bpf::program::Program;
use portmap::sys::bpf::{Direction, tcx};

use crate::{classifier, isolated, kernel, run, veth};

fn with_tcx(test: impl FnOnce() + Send) {
    match kernel() {
        version if version < (6, 6) => println!("no tcx here"),
        _ => isolated(test),
    }
}

#[test]
#[ignore = "privileged: needs bpf(2) and network namespaces"]
fn ours_runs_first_and_keeps_its_place() {
    with_tcx(|| {
        let device = veth();
        let [ours, newer, foreign, other] =
            ["pm_a", "pm_b", "foreign", "other"].map(|name| classifier(name, -1));
        for direction in Direction::ALL {
            let ids = || tcx::query(device, direction).unwrap().programs;
            assert!(ids().is_empty());
            tcx::attach_first(device, direction, &foreign).unwrap();
            tcx::attach_first(device, direction, &ours).unwrap();
            assert_eq!(ids(), [ours.id(), foreign.id()]);
            let again = tcx::attach_first(device, direction, &ours).unwrap_err();
            assert_eq!(again.kind(), ErrorKind::AlreadyExists);
            tcx::attach_first(device, direction, &other).unwrap();
            let order = [other.id(), ours.id(), foreign.id()];
            assert_eq!(ids(), order);

            let seen = tcx::query(device, direction).unwrap().revision;
            let stale = tcx::replace(device, direction, &ours, &newer, seen - 1).unwrap_err();
            assert_eq!(stale.raw_os_error(), Some(libc::ESTALE));
            assert_eq!(ids(), order);
            tcx::replace(device, direction, &ours, &newer, seen).unwrap();
            assert_eq!(ids(), [other.id(), newer.id(), foreign.id()]);
            assert!(tcx::replace(device, direction, &ours, &newer, 0).is_err());

            assert!(!tcx::detach(device, direction, &ours).unwrap());
            assert!(tcx::detach(device, direction, &newer).unwrap());
            assert_eq!(ids(), [other.id(), foreign.id()]);
        }
    });
}

#[test]
#[ignore = "privileged: needs bpf(2) and network namespaces"]
fn more_programs_than_one_query_expects() {
    with_tcx(|| {
        let device = veth();
        let programs: Vec<Program> = (0..20).map(|n| classifier(&format!("pm_{n}"), -1)).collect();
        for program in &programs {
            tcx::attach_first(device, Direction::Ingress, program).unwrap();
        }
        let expected: Vec<u32> = programs.iter().rev().map(Program::id).collect();
        assert_eq!(tcx::query(device, Direction::Ingress).unwrap().programs, expected);
    });
}

#[test]
#[ignore = "privileged: needs bpf(2) and network namespaces"]
fn nothing_stays_of_a_device_that_is_gone() {
    with_tcx(|| {
        let device = veth();
        let program = classifier("pm_gone", -1);
        let id = program.id();
        tcx::attach_first(device, Direction::Ingress, &program).unwrap();
        drop(program);
        assert!(Program::from_id(id).unwrap().is_some());
        run("ip link del pm0");
        assert_eq!(
            tcx::query(device, Direction::Ingress).unwrap_err().raw_os_error(),
            Some(libc::ENODEV)
        );
        // The kernel lets go of it in a while.
        while Program::from_id(id).unwrap().is_some() {
            std::thread::yield_now();
        }
    });
}
