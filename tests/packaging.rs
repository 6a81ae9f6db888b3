//! What is handed out beside the binary does what it says: examples, scripts, units and lists.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "these tests run scripts and look at the files that they leave"
)]

#[path = "../build.rs"]
#[allow(
    dead_code,
    clippy::print_stdout,
    reason = "what cargo runs has a main, which tells it by stdout"
)]
mod build;
#[path = "support/cgroups.rs"]
mod cgroups;
#[path = "support/executable.rs"]
mod executable;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use clap::Parser;
use executable::write_executable;
use portmap::conflist::check::analyse;
use portmap::usage::Cli;
use serde_json::Value;

const PORTMAP: &str = env!("CARGO_BIN_EXE_portmap");
const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn example(name: &str) -> PathBuf {
    Path::new(ROOT).join("examples").join(name)
}

fn read(name: &str) -> String {
    fs::read_to_string(example(name)).unwrap()
}

fn files(dir: &str, ending: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(example(dir)).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> =
        entries.filter(|path| path.to_str().unwrap().ends_with(ending)).collect();
    files.sort();
    assert!(!files.is_empty(), "there is no {ending} in {dir}");
    files
}

/// A directory that is gone when the test has passed.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("packaging-{name}-{}", std::process::id()));
        drop(fs::remove_dir_all(&path));
        fs::create_dir_all(&path).unwrap();
        Dir(path)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            drop(fs::remove_dir_all(&self.0));
        }
    }
}

/// Runs a script of sh in a mount namespace of its own.
fn isolated(script: &str) -> Output {
    let script = format!("set -eu; {script}");
    Command::new("unshare")
        .args(["-m", "--propagation", "private", "sh", "-c", &script])
        .output()
        .unwrap()
}

#[track_caller]
fn succeeds(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_lists_are_sound() {
    for path in files("conflists", ".conflist") {
        let analysis = analyse(&fs::read_to_string(&path).unwrap(), &[]).unwrap();
        assert_eq!(analysis.findings, [], "{}", path.display());
        assert_eq!(analysis.plugins[1], "portmap", "{}", path.display());
    }
}

#[test]
fn the_config_map_holds_the_list_as_it_is() {
    let map = read("kubernetes/cilium-custom-conf.yaml");
    let (_, block) = map.split_once("cni-config: |\n").unwrap();
    let list: Vec<&str> = block.lines().map(|line| line.strip_prefix("    ").unwrap()).collect();
    assert_eq!(list.join("\n") + "\n", read("conflists/cilium-custom.conflist"));
}

/// Command lines in a manifest (flow sequences of JSON) and in units.
#[test]
fn every_command_line_is_understood() {
    let manifest = read("kubernetes/daemonset.yaml");
    let mut lines: Vec<Vec<String>> = manifest
        .lines()
        .filter_map(|line| line.trim().strip_prefix("args: "))
        .map(|args| serde_json::from_str(args).unwrap())
        .collect();
    assert_eq!(lines.len(), 2);
    let units = files("systemd", ".service");
    for unit in &units {
        let unit = fs::read_to_string(unit).unwrap();
        let command = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
        // Programs and not this one's commands.
        if !command.ends_with(" restore") {
            lines.push(command.split(' ').skip(1).map(str::to_owned).collect());
        }
    }
    for line in lines {
        let words = std::iter::once("portmap").chain(line.iter().map(String::as_str));
        assert!(Cli::try_parse_from(words).is_ok(), "{line:?}");
    }
}

/// systemd's default limit is 5 starts in 10 s: the next one fails, and the unit that triggers it with it.
#[test]
fn what_a_unit_triggers_may_start_as_often_as_it_likes() {
    let mut triggers = files("systemd", ".path");
    triggers.extend(files("systemd", ".timer"));
    assert_eq!(triggers.len(), 2);
    for trigger in triggers {
        let text = fs::read_to_string(&trigger).unwrap();
        assert!(!text.contains("\nUnit="), "{} triggers another one", trigger.display());
        let service = fs::read_to_string(trigger.with_extension("service")).unwrap();
        let (unit, _) = service.split_once("\n[Service]").unwrap();
        assert!(unit.lines().any(|line| line == "StartLimitIntervalSec=0"), "{service}");
    }
}

#[test]
fn the_ignition_file_says_what_the_butane_file_says() {
    let ignition: Value = serde_json::from_str(&read("init/flatcar.ign")).unwrap();
    let butane = read("init/flatcar.bu");
    assert_eq!(ignition["ignition"]["version"], "3.3.0");
    let file = &ignition["storage"]["files"][0];
    assert_eq!(
        (&file["path"], file["mode"].as_u64()),
        (&"/opt/cni/bin/portmap".into(), Some(0o755))
    );
    for value in [&file["contents"]["source"], &file["contents"]["verification"]["hash"]] {
        assert!(butane.contains(value.as_str().unwrap()), "{value} is not in {butane}");
    }
}

#[test]
#[ignore = "privileged: mounts in a mount namespace of its own"]
fn systemd_understands_the_units() {
    let units: Vec<String> =
        files("systemd", "").iter().map(|path| path.display().to_string()).collect();
    let output = isolated(&format!(
        "mount -t tmpfs none /opt; mount -t tmpfs none /usr/local
         mkdir -p /opt/cni/bin /usr/local/libexec/portmap
         for path in /opt/cni/bin /usr/local/libexec/portmap; do ln -s /bin/true $path/portmap; done
         systemd-analyze verify --man=no {}",
        units.join(" ")
    ));
    succeeds(&output);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

/// A node's root with this machine's programs, and a directory from which releases are downloaded.
fn scratch_root(dir: &Dir) -> String {
    let root = dir.0.join("root");
    let release = dir.0.join("portmap-0.1.0-x86_64");
    fs::create_dir_all(&release).unwrap();
    for (from, to) in
        [(PORTMAP.to_owned(), "portmap"), (format!("{ROOT}/install.sh"), "install.sh")]
    {
        fs::copy(from, release.join(to)).unwrap();
    }
    assert!(
        Command::new("cp")
            .arg("-R")
            .arg(example(""))
            .arg(release.join("examples"))
            .status()
            .unwrap()
            .success()
    );
    format!(
        "tar -cf - -C {dir} portmap-0.1.0-x86_64 | gzip -1 > {dir}/release.tar.gz
         root={root}; mkdir -p $root; mount -t tmpfs none $root; cd $root
         mkdir usr proc dev tmp opt etc etc/systemd etc/systemd/system init
         for link in bin sbin lib lib64; do ln -s usr/$link $link; done
         mount --rbind /usr usr; mount -t proc proc proc; mount --rbind /dev dev
         # What a unit is started with is not part of what is shown here.
         mount -t tmpfs none usr/local; mkdir usr/local/sbin
         printf '#!/bin/sh\\necho \"$@\" >> /systemctl.log\\n' > usr/local/sbin/systemctl
         chmod 755 usr/local/sbin/systemctl
         cp {dir}/release.tar.gz opt/; cp {examples}/init/*.sh init/
         run() {{ chroot $root /usr/bin/env -i PATH=/usr/local/sbin:/usr/sbin:/usr/bin HOME=/root \
             PORTMAP_URL=file:///opt/release.tar.gz PORTMAP_SHA256=${{hash-$(sha256sum < opt/release.tar.gz | cut -c1-64)}} \
             sh /init/$1; }}
         ",
        dir = dir.0.display(),
        root = root.display(),
        examples = example("").display(),
    )
}

#[test]
#[ignore = "privileged: a root directory of its own"]
fn the_init_scripts_install_in_a_scratch_root() {
    let dir = Dir::new("init");
    let prepare = scratch_root(&dir);
    for script in files("init", ".sh") {
        let name = script.file_name().unwrap().to_str().unwrap().to_owned();
        let output = isolated(&format!(
            "{prepare}
             # A download that is not what was asked for changes nothing.
             if hash=0000000000000000000000000000000000000000000000000000000000000000 run {name}; then exit 8; fi
             [ ! -e opt/cni ]
             run {name}
             cmp opt/cni/bin/portmap {PORTMAP}
             [ \"$(ls -A opt/cni/bin)\" = portmap ]; [ -z \"$(ls -A tmp)\" ]
             run {name}; cmp opt/cni/bin/portmap {PORTMAP}
             case {name} in
                 al2023.sh)
                     cmp usr/local/libexec/portmap/portmap {PORTMAP}
                     cmp etc/systemd/system/portmap-watch.service {unit}
                     grep -q 'enable portmap-watch.service' systemctl.log
                     [ \"$(tail -n 1 systemctl.log)\" = 'restart portmap-watch.service' ] ;;
                 aks.sh)
                     mkdir -p etc/cni/net.d; cp {list} etc/cni/net.d/10-x.conflist; run {name} ;;
             esac",
            unit = example("systemd/portmap-watch.service").display(),
            list = example("conflists/ptp.conflist").display(),
        ));
        succeeds(&output);
    }
}

#[test]
#[ignore = "privileged: drops capabilities, mounts in a mount namespace of its own"]
fn the_containers_need_no_capability_and_no_writable_root() {
    let dir = Dir::new("container");
    let output = isolated(&format!(
        "root={root}; mkdir -p $root; mount -t tmpfs none $root; cd $root
         mkdir -p host/opt/cni/bin host/etc/cni/net.d; cp {PORTMAP} portmap
         for path in host/opt/cni/bin host/etc/cni/net.d; do mount -t tmpfs none $path; done
         echo '{{\"name\": \"x\", \"plugins\": [{{\"type\": \"ptp\"}}]}}' > host/etc/cni/net.d/10-x.conflist
         mount -o remount,ro none $root
         setpriv --bounding-set=-all --inh-caps=-all --no-new-privs ./portmap install \
             --dest=$root/host/opt/cni/bin --conflist=auto --conf-dir=$root/host/etc/cni/net.d
         cmp portmap host/opt/cni/bin/portmap
         if touch $root/x 2>/dev/null; then exit 8; fi",
        root = dir.0.join("root").display(),
    ));
    let said = succeeds(&output);
    assert!(said.contains("put portmap behind ptp"), "{output:?}");
}

/// Kubespray makes them kube's.
#[test]
#[ignore = "privileged: drops capabilities, mounts in a mount namespace of its own"]
fn directories_of_another_user_need_what_the_manifest_and_the_unit_give() {
    let manifest = read("kubernetes/daemonset.yaml");
    let (_, added) = manifest.split_once("capabilities: {drop: [ALL], add: [").unwrap();
    let added: Vec<String> =
        added.split(']').next().unwrap().split(", ").map(str::to_owned).collect();
    let unit = read("systemd/portmap-watch.service");
    let bounding =
        unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).unwrap();
    let named: Vec<String> = added.iter().map(|name| format!("CAP_{name}")).collect();
    assert_eq!(bounding, named.join(" "));
    let set = added.iter().map(|name| format!(",+{}", name.to_lowercase())).collect::<String>();

    let dir = Dir::new("owner");
    let output = isolated(&format!(
        "root={root}; mkdir -p $root; mount -t tmpfs none $root; cd $root
         mkdir bin net.d; cp {PORTMAP} portmap
         echo '{{\"name\": \"x\", \"plugins\": [{{\"type\": \"ptp\"}}]}}' > net.d/10-x.conflist
         chmod 600 net.d/10-x.conflist; chown -R 4711:4712 bin net.d; chmod 755 bin net.d
         install() {{ setpriv --bounding-set=-all$1 --inh-caps=-all --no-new-privs ./portmap install \
             --dest=$root/bin --conflist=auto --conf-dir=$root/net.d; }}
         if install '' 2> said; then exit 8; fi
         cat said >&2
         grep -q 'bin belongs to user 4711, and root needs CAP_DAC_OVERRIDE, CAP_CHOWN, CAP_FOWNER here' said
         install {set}
         [ $(stat -c %u:%g:%a net.d/10-x.conflist) = 4711:4712:600 ]
         cmp portmap bin/portmap",
        root = dir.0.join("root").display(),
    ));
    let said = succeeds(&output);
    assert!(said.contains("put portmap behind ptp"), "{output:?}");
}

#[test]
#[ignore = "privileged: makes an image with buildah"]
fn the_image_is_the_binary_and_runs() {
    let dir = Dir::new("image");
    let storage = dir.0.join("storage");
    fs::copy(PORTMAP, dir.0.join("portmap")).unwrap();
    let buildah =
        format!("buildah --root {0} --runroot {0}/run --storage-driver vfs", storage.display());
    let output = isolated(&format!(
        "{buildah} bud --isolation chroot -q -t portmap:test -f {} {dir}
         container=$({buildah} from --pull-never portmap:test)
         mount=$({buildah} mount $container)
         ls -A $mount; chroot $mount /portmap --version",
        example("image/Containerfile").display(),
        dir = dir.0.display(),
    ));
    let said = succeeds(&output);
    assert!(
        said.ends_with(concat!("portmap\nportmap ", env!("CARGO_PKG_VERSION"), "\n")),
        "{said}"
    );
}

#[test]
fn only_gnu_ld_is_given_an_order_of_functions() {
    let dir = Dir::new("linker");
    for (index, (version, knows)) in [
        ("GNU ld (GNU Binutils for Debian) 2.40", true),
        ("GNU gold (GNU Binutils for Debian 2.40) 1.16", false),
        ("mold 2.40.4 (compatible with GNU ld)", false),
        ("LLD 22.1.2 (compatible with GNU linkers)", false),
    ]
    .into_iter()
    .enumerate()
    {
        let linker = dir.0.join(format!("cc{index}"));
        write_executable(
            &linker,
            format!("#!/bin/sh\n[ \"$*\" = -Wl,--version ] && echo '{version}'\n"),
        );
        assert_eq!(build::knows_insert(linker.to_str().unwrap(), ""), knows, "{version}");
    }
    assert!(!build::knows_insert(dir.0.join("none").to_str().unwrap(), ""));
    let gnu = dir.0.join("cc0");
    for (flags, knows) in [
        ("-C\x1ftarget-feature=+crt-static\x1f--remap-path-prefix\x1f/linker=/x", true),
        ("-C\x1fopt-level=3\x1f-C\x1flink-arg=-fuse-ld=mold", false),
        ("-Clinker=/usr/bin/mold", false),
        ("--codegen=link-args=-fuse-ld=gold", false),
        ("-Zlinker-features=+lld", false),
    ] {
        assert_eq!(build::knows_insert(gnu.to_str().unwrap(), flags), knows, "{flags}");
    }
}

/// All else goes with the namespaces that the script makes.
#[test]
#[ignore = "privileged: programs at the root of cgroup v2"]
fn a_profile_that_fails_leaves_no_programs() {
    let dir = Dir::new("functions");
    let bin = dir.0.join("bin");
    fs::create_dir(&bin).unwrap();
    write_executable(&bin.join("valgrind"), "#!/bin/sh\nexit 3\n");
    let output = isolated(&format!(
        "programs() {{ bpftool cgroup show {group} | awk '$NF ~ /^pm_/' | sort; }}
         before=$(programs); status=0
         PATH={bin}:$PATH unshare --net --mount --pid --fork --mount-proc sh {ROOT}/scripts/functions.sh inside {PORTMAP} {dir} || status=$?
         [ $status = 3 ]; programs; [ \"$(programs)\" = \"$before\" ]",
        group = cgroups::mounted().display(),
        bin = bin.display(),
        dir = dir.0.display(),
    ));
    succeeds(&output);
}

/// The script around cargo: what is built is the business of the compiler.
#[test]
fn a_release_is_the_same_bytes_wherever_it_is_made() {
    let dir = Dir::new("release");
    let cargo = dir.0.join("bin/cargo");
    fs::create_dir_all(dir.0.join("bin")).unwrap();
    let stub = format!(
        "#!/bin/sh
         case $1 in
             metadata) echo '{{\"packages\":[{{\"name\":\"portmap\",\"version\":\"1.2.3\",\"id\":\"x\"}}]}}' ;;
             build) mkdir -p $CARGO_TARGET_DIR/x86_64-unknown-linux-musl/release
                 cp {} $CARGO_TARGET_DIR/x86_64-unknown-linux-musl/release/portmap ;;
             cyclonedx) while [ $1 != --override-filename ]; do shift; done; echo '{{}}' > $2.json ;;
         esac\n",
        dir.0.join("small").display(),
    );
    // Compressing an unoptimized build takes longer than all the rest.
    let small = format!("#!/bin/sh\nexec {PORTMAP} \"$@\"\n");
    write_executable(&dir.0.join("small"), small);
    write_executable(&cargo, &stub);
    write_executable(&dir.0.join("bin/cargo-cyclonedx"), &stub);
    let path = format!("{}:/usr/bin:/bin", dir.0.join("bin").display());
    let release = |name: &str, umask: &str| {
        let out = dir.0.join(name);
        let output = Command::new("sh")
            .args([
                "-c",
                "umask $1; exec \"$2/scripts/release.sh\" --out \"$3\"",
                "sh",
                umask,
                ROOT,
            ])
            .arg(&out)
            .env_clear()
            .env("PATH", &path)
            .env("HOME", &dir.0)
            .env("SOURCE_DATE_EPOCH", "1700000000")
            .output()
            .unwrap();
        succeeds(&output);
        out
    };
    let (first, second) = (release("first", "022"), release("second", "077"));
    let archive = "portmap-1.2.3-x86_64.tar.gz";
    assert!(fs::read(first.join(archive)).unwrap() == fs::read(second.join(archive)).unwrap());
    let sums = "sha256sum --strict --check SHA256SUMS";
    let checked = Command::new("sh").args(["-c", sums]).current_dir(&first).output().unwrap();
    let checked = succeeds(&checked);
    for name in [archive, "portmap-1.2.3-x86_64", "portmap-1.2.3-x86_64.cdx.json"] {
        assert!(checked.contains(&format!("{name}: OK")), "{checked}");
    }
    let list = Command::new("tar").arg("-tvzf").arg(first.join(archive)).output().unwrap();
    let list = succeeds(&list);
    for name in [
        "portmap",
        "install.sh",
        "LICENSE",
        "examples/kubernetes/daemonset.yaml",
        "man/portmap.8",
        "man/portmap-install.8",
        "completions/portmap.bash",
    ] {
        let line =
            list.lines().find(|line| line.ends_with(&format!(" portmap-1.2.3-x86_64/{name}")));
        let line = line.unwrap_or_else(|| panic!("{name} is not in {list}"));
        assert!(line.contains(" 0/0 ") && line.contains(" 2023-11-14 "), "{line}");
    }
}
