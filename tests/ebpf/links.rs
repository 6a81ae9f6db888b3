//! Whose matter a link is: an attachment's CHECK looks at its own, at the uplinks, and for what is wrong with
//! programs that are there.

use portmap::backend::ebpf::devices::{self, Matter, Mode, Scope};
use portmap::backend::ebpf::loaded::{Found, Loaded, OWN};
use portmap::demo::topology::{Lab, Options, Shape};
use portmap::model::Family;
use portmap::sys::Host;
use portmap::sys::bpf::numbers::Numbers;

use super::support::PORTMAP;
use super::{Scene, lab};

impl Scene<'_> {
    fn listed(&self) -> String {
        let dir = self.node.state_dir.display();
        self.node.shell(&format!("{PORTMAP} list --state-dir {dir} || true"))
    }
}

/// Between the ADD of another pod's main plugin and that of portmap.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_new_link_of_another_pod_is_no_fault() {
    for shape in [Shape::Cilium, Shape::Ptp, Shape::Bridge] {
        let lab = Lab::build(Options::new(shape)).unwrap();
        let scene = Scene::new(&lab);
        scene.ok("ADD", 0);
        let [own, other] = [0, 1].map(|pod| lab.pods[pod].host_link.as_str());
        let text = format!("{other}: program pm_pod_in expected");
        scene.node.shell(&format!("tc qdisc del dev {other} clsact"));
        scene.ok("CHECK", 0);
        assert!(scene.listed().contains(&text), "{shape:?}: {}", scene.listed());
        scene.ok("ADD", 1);

        // What has been there and is not any more is everybody's matter.
        scene.node.shell(&format!("tc filter del dev {other} ingress"));
        let (code, problem) = scene.fails("CHECK", 0);
        assert!(code == 102 && problem.contains(&text), "{shape:?}: {problem}");
        scene.ok("ADD", 1);
        scene.ok("CHECK", 0);
        scene.node.shell(&format!("tc qdisc del dev {own} clsact"));
        let (code, problem) = scene.fails("CHECK", 0);
        let text = format!("{own}: program pm_pod_in expected");
        assert!(code == 102 && problem.contains(&text), "{shape:?}: {problem}");
        scene.ok("CHECK", 1);
        scene.ok("ADD", 1);
        scene.ok("CHECK", 0);
        (0..2).for_each(|pod| drop(scene.ok("DEL", pod)));
    }
}

/// What leads to the pod may be another device than its own link, as where a gateway of pods stands between.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn what_leads_to_the_pod_is_its_own_matter() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    scene.ok("ADD", 0);
    let pod = lab.pods[0].address(Family::V4).unwrap();
    scene.node.shell(&format!(
        "ip link add way type veth peer name yaw && ip link set way up && ip link set yaw up
         ip route replace {pod} dev way"
    ));
    let (code, problem) = scene.fails("CHECK", 0);
    assert!(code == 102 && problem.contains("way: program pm_pod_in expected"), "{problem}");
    // The other end leads to nobody, and is as good as another pod's.
    assert!(!problem.contains("yaw: "), "{problem}");
    scene.ok("ADD", 1);
    scene.ok("CHECK", 0);
    (0..2).for_each(|pod| drop(scene.ok("DEL", pod)));
    scene.node.flush();
}

/// Another pod goes between the listing of the devices and the look at them.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_link_that_has_gone_is_no_problem_anywhere() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    scene.ok("ADD", 0);
    let look = || {
        let host = Host::new(None);
        let Found::Loaded(loaded) = Loaded::open(&OWN, true, &Numbers::default()).unwrap() else {
            panic!("nothing is loaded");
        };
        let facts = host.node_facts().unwrap();
        let links = host.links().unwrap();
        let find =
            |matter: &Matter| devices::problems(&host, &loaded, &links, &facts, matter).unwrap();
        let hooked = || {
            let all = devices::hooked(&host, &loaded, &links, &facts).unwrap();
            all.into_iter().map(|(hook, found)| (hook.device, found)).collect::<Vec<_>>()
        };
        let none = Matter::Of(std::collections::BTreeSet::new());
        assert_eq!([find(&Matter::All), find(&none)], [const { Vec::<String>::new() }; 2]);
        let gone = &lab.pods[1].host_link;
        assert_eq!(hooked().iter().filter(|(device, _)| device == gone).count(), 2);
        scene.node.shell(&format!("ip link del {gone}"));
        assert_eq!([find(&Matter::All), find(&none)], [const { Vec::<String>::new() }; 2]);
        assert!(hooked().iter().all(|(device, found)| device != gone && *found));
        // Nor does it keep an ADD from what the other links need.
        for mode in [Mode::Extend, Mode::Restore] {
            let sync = devices::sync(&host, &loaded, &links, &facts, Scope::All, mode);
            assert!(sync.unwrap(), "{mode:?}");
        }
    };
    lab.node.run(look).unwrap();
    scene.node.flush();
}
