//! A node with its own directories, and what doctor says of it.

use std::path::{Path, PathBuf};
use std::process::Command;

use portmap::demo::plugin::{self, Attachment, Output};
use portmap::demo::topology::{Lab, Options, Shape};
use serde_json::{Value, json};

use crate::support::{Node, PORTMAP, Variant, attachment, prev_result};

pub const LIST: &str = r#"{"cniVersion": "1.0.0", "name": "portmap", "plugins": [
  {"type": "ptp"},
  {"type": "portmap", "stateDir": "STATE", "capabilities": {"portMappings": true}}
]}"#;

/// A report, and the status that came with it.
#[derive(Debug)]
pub struct Report {
    pub status: Option<i32>,
    pub json: Value,
}

impl Report {
    /// Findings of one check that are not fine.
    pub fn of(&self, check: &str) -> Vec<&Value> {
        let all = self.json["findings"].as_array().unwrap().iter();
        all.filter(|finding| finding["check"] == check && finding["severity"] != "fine").collect()
    }

    /// The only finding of a check that is not fine.
    #[track_caller]
    pub fn only(&self, check: &str) -> &Value {
        match self.of(check).as_slice() {
            [one] => one,
            other => panic!("{check}: {other:#?} in {:#}", self.json),
        }
    }

    /// Every check that has something to say, with how bad it is.
    pub fn checks(&self) -> Vec<(String, String)> {
        let all = self.json["findings"].as_array().unwrap().iter();
        all.filter(|finding| finding["severity"] != "fine")
            .map(|finding| {
                let text = |key: &str| finding[key].as_str().unwrap().to_owned();
                (text("check"), text("severity"))
            })
            .collect()
    }
}

/// A node on which everything is as it should be, with a live pod at hostPort 8080.
pub struct Rig<'a> {
    pub lab: &'a Lab,
    pub node: Node<'a>,
    pub conf_dir: PathBuf,
    pub dest: PathBuf,
    _state: Shared,
}

pub fn lab(pods: usize) -> Lab {
    Lab::build(Options { pods, ..Options::new(Shape::Ptp) }).unwrap()
}

impl<'a> Rig<'a> {
    pub fn new(lab: &'a Lab, variant: Variant) -> Self {
        let mut node = Node::new(&lab.node, variant);
        let base = node.state_dir.parent().unwrap().to_owned();
        let (conf_dir, dest) = (base.join("net.d"), base.join("bin"));
        for dir in [&conf_dir, &dest] {
            std::fs::create_dir_all(dir).unwrap();
        }
        // In memory, as /run is.
        let shared = PathBuf::from("/dev/shm").join(base.file_name().unwrap());
        drop(std::fs::remove_dir_all(&shared));
        node.state_dir = shared.clone();
        let rig = Rig { lab, node, conf_dir, dest, _state: Shared(shared) };
        rig.write_list(LIST);
        rig.run(&["install", "--dest", rig.dest.to_str().unwrap()]);
        rig
    }

    pub fn write_list(&self, text: &str) {
        let text = text.replace("STATE", self.node.state_dir.to_str().unwrap());
        std::fs::write(self.conf_dir.join("10-pods.conflist"), text).unwrap();
    }

    /// hostPort 8080 of pod-a, 8081 of pod-b and so on.
    pub fn add(&self, pod: usize) -> (Value, Attachment) {
        let port = 8080 + u16::try_from(pod).unwrap();
        let mappings = json!([{"hostPort": port, "containerPort": 80}]);
        let config = self.node.config(mappings, prev_result(self.lab, pod, "1.0.0"));
        let attachment = attachment(&self.lab.pods[pod], &format!("container-{pod}"));
        self.node.ok("ADD", &config, &attachment);
        (config, attachment)
    }

    /// Runs a command of the plugin in the node, with the variant's tools.
    pub fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(PORTMAP);
        command.env_clear().env("PATH", &self.node.path).args(arguments);
        let output = plugin::run(&mut command, b"", self.node.netns).unwrap();
        assert!(output.success(), "{arguments:?} {} {}", output.stdout, output.stderr);
        output
    }

    pub fn arguments(&self) -> Vec<String> {
        let path = |path: &Path| path.to_str().unwrap().to_owned();
        [
            "--state-dir",
            &path(&self.node.state_dir),
            "--conf-dir",
            &path(&self.conf_dir),
            "--dest",
            &path(&self.dest),
        ]
        .map(ToOwned::to_owned)
        .into()
    }

    /// With the variant's tools alone.
    pub fn doctor(&self) -> Report {
        self.doctor_with(&self.node.path.clone())
    }

    pub fn doctor_with(&self, path: &Path) -> Report {
        let mut command = Command::new(PORTMAP);
        command.env_clear().env("PATH", path).args(["doctor", "--json"]).args(self.arguments());
        report(plugin::run(&mut command, b"", self.node.netns).unwrap())
    }

    pub fn doctor_text(&self) -> String {
        let mut command = Command::new(PORTMAP);
        command.env_clear().env("PATH", &self.node.path).arg("doctor").args(self.arguments());
        plugin::run(&mut command, b"", self.node.netns).unwrap().stdout
    }

    /// Runs the command that a finding names, as a person would.
    #[track_caller]
    pub fn follow(&self, finding: &Value) {
        let fix = finding["fix"].as_str().unwrap();
        let mut command = fix.to_owned();
        for (verb, option) in
            [("install", "--dest"), ("restore", "--state-dir"), ("flush", "--state-dir")]
        {
            let named = format!("portmap {verb}");
            // Nothing of the machine's own may be changed.
            assert!(!fix.contains(&named) || fix.contains(option), "{finding}");
            command = command.replace(&named, &format!("{PORTMAP} {verb}"));
        }
        // Nobody is there to be asked.
        command = command.replace("flush --all", "flush --all --yes");
        // What it makes for the moment goes with the node.
        let scratch = self.conf_dir.parent().unwrap().display();
        self.node.shell(&format!("export TMPDIR={scratch}; {command}"));
    }
}

/// Goes after the node, whose end looks for records.
struct Shared(PathBuf);

impl Drop for Shared {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

pub fn report(output: Output) -> Report {
    let json = serde_json::from_str(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {} {}", output.stdout, output.stderr));
    Report { status: output.status, json }
}
