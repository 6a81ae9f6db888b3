//! `install.sh` on real directories: what a node's init script and a killed one leave behind.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "these tests run a script and look at the files that it leaves"
)]

#[path = "support/executable.rs"]
mod executable;
#[path = "support/running.rs"]
mod running;

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use executable::write_executable;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use running::{Running, fails, names, succeeds, text};

const INSTALL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/install.sh");
const TARGET: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/target.sh");

/// Everything of coreutils that a node is asked for. A tool that is not in this list is not there
/// when the script runs under dash.
const COREUTILS: &[&str] = &[
    "cat",
    "chmod",
    "cp",
    "dirname",
    "id",
    "mkdir",
    "mktemp",
    "mv",
    "od",
    "rm",
    "sha256sum",
    "stat",
    "sync",
    "timeout",
    "tr",
    "true",
    "uname",
];

/// A directory that is gone when the test has passed.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("install-{name}-{}", std::process::id()));
        drop(fs::remove_dir_all(&path));
        fs::create_dir_all(&path).unwrap();
        Dir(path)
    }

    fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A portmap that knows its version and nothing else, made large enough for its copying to
    /// take time.
    fn portmap(&self, version: &str, padding: usize) -> PathBuf {
        let path = self.join(&format!("portmap-{version}"));
        let mut script = format!("#!/bin/sh\necho portmap {version}\nexit 0\n").into_bytes();
        script.resize(script.len() + padding, b'#');
        write_executable(&path, script);
        path
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            drop(fs::remove_dir_all(&self.0));
        }
    }
}

/// A shell, and the only directory in which it finds tools.
struct Shell {
    argv: Vec<PathBuf>,
    path: PathBuf,
}

impl Shell {
    fn dash(dir: &Dir) -> Self {
        let path = dir.join("coreutils");
        fs::create_dir_all(&path).unwrap();
        for tool in COREUTILS {
            symlink(find(tool), path.join(tool)).unwrap();
        }
        Shell { argv: vec![find("dash")], path }
    }

    fn busybox(dir: &Dir) -> Self {
        let path = dir.join("applets");
        fs::create_dir_all(&path).unwrap();
        let busybox = find("busybox");
        assert!(
            Command::new(&busybox)
                .arg("--install")
                .arg("-s")
                .arg(&path)
                .status()
                .unwrap()
                .success()
        );
        Shell { argv: vec![busybox, "sh".into()], path }
    }

    fn both(dir: &Dir) -> [Self; 2] {
        [Self::dash(dir), Self::busybox(dir)]
    }

    fn command(&self, script: &Path) -> Command {
        let mut command = Command::new(&self.argv[0]);
        command
            .args(&self.argv[1..])
            .arg(script)
            .env_clear()
            .env("PATH", &self.path)
            .stdin(Stdio::null());
        command
    }

    fn install(&self, binary: &Path, dest: &Path) -> Command {
        let mut command = self.command(Path::new(INSTALL));
        command.arg("--binary").arg(binary).arg("--dest").arg(dest);
        command
    }
}

/// A program that is found in PATH.
fn program(shell: &Shell, name: &str, script: &str) {
    script_at(&shell.path.join(name), script);
}

fn script_at(path: &Path, script: &str) {
    write_executable(path, format!("#!/bin/sh\n{script}\n"));
}

/// A checkout, and a compiler with glibc's standard library alone.
fn source(dir: &Dir, shell: &Shell) -> PathBuf {
    let source = dir.join("source");
    fs::create_dir_all(source.join("scripts")).unwrap();
    fs::write(source.join("Cargo.toml"), "").unwrap();
    write_executable(&source.join("install.sh"), fs::read(INSTALL).unwrap());
    write_executable(&source.join("scripts/target.sh"), fs::read(TARGET).unwrap());
    symlink(find("sed"), shell.path.join("sed")).unwrap();
    let rustc = format!(
        "case $1 in --version) echo host: x86_64-unknown-linux-gnu ;; *) echo {}/$4 ;; esac",
        dir.join("rustlib").display()
    );
    program(shell, "rustc", &rustc);
    source
}

/// A tool that is missing is a failure, never a test that was passed.
fn find(tool: &str) -> PathBuf {
    ["/usr/bin", "/bin", "/usr/sbin", "/sbin"]
        .iter()
        .map(|dir| Path::new(dir).join(tool))
        .find(|path| path.exists())
        .unwrap_or_else(|| panic!("{tool} is not installed; tests/run.sh installs it"))
}

#[test]
fn installs_into_a_new_directory_and_then_has_nothing_to_do() {
    let dir = Dir::new("idempotent");
    for (i, shell) in Shell::both(&dir).iter().enumerate() {
        let (new, dest) = (dir.portmap("1.0.0", 0), dir.join(&format!("opt{i}/cni/bin")));
        // What a download leaves is not executable.
        fs::set_permissions(&new, PermissionsExt::from_mode(0o600)).unwrap();

        let said = succeeds(&mut shell.install(&new, &dest));
        assert!(said.contains("Created") && said.contains("(portmap 1.0.0)"), "{said}");
        assert_eq!(names(&dest), ["portmap"]);
        let installed = fs::metadata(dest.join("portmap")).unwrap();
        assert_eq!(installed.permissions().mode() & 0o7777, 0o755);

        let said = succeeds(&mut shell.install(&new, &dest));
        assert!(said.contains("already up to date (portmap 1.0.0)"), "{said}");
        let again = fs::metadata(dest.join("portmap")).unwrap();
        assert_eq!(again.modified().unwrap(), installed.modified().unwrap());
    }
}

#[test]
fn the_directory_comes_from_the_environment_and_the_binary_from_beside_the_script() {
    let dir = Dir::new("beside");
    let shell = Shell::dash(&dir);
    let script = dir.join("install.sh");
    write_executable(&script, fs::read(INSTALL).unwrap());
    fails(shell.command(&script).env("CNI_BIN_DIR", dir.join("bin")), 1, "give --binary FILE");

    fs::rename(dir.portmap("1.0.0", 0), dir.join("portmap")).unwrap();
    succeeds(shell.command(&script).env("CNI_BIN_DIR", dir.join("bin")));
    assert_eq!(names(&dir.join("bin")), ["portmap"]);
}

#[test]
fn without_cargo_it_says_what_is_missing() {
    let dir = Dir::new("no-cargo");
    let mut command = Shell::dash(&dir).command(Path::new(INSTALL));
    fails(
        command.arg("--dest").arg(dir.join("bin")).env("HOME", &dir.0),
        1,
        "no cargo to build it with",
    );
    assert!(!dir.join("bin").exists());
}

#[test]
fn a_build_is_found_wherever_cargo_put_it() {
    let dir = Dir::new("build");
    let shell = Shell::dash(&dir);
    let source = source(&dir, &shell);
    let built = dir.portmap("1.0.0", 0);
    // A cargo that was "found" only in the home directory, as in an init script.
    let cargo = dir.join("home/.cargo/bin/cargo");
    fs::create_dir_all(cargo.parent().unwrap()).unwrap();
    let artifact = format!(
        r#"{{"reason":"compiler-artifact","target":{{"name":"portmap"}},"executable":"{}","fresh":true}}"#,
        built.display()
    );
    script_at(
        &cargo,
        &format!(
            "[ \"$PWD\" = '{}' ] || exit 9\nprintf '%s\\n' '{{\"executable\":null}}' '{artifact}' \
             '{{\"reason\":\"build-finished\",\"success\":true}}'",
            source.display()
        ),
    );

    let mut command = shell.command(&source.join("install.sh"));
    succeeds(command.arg("--dest").arg(dir.join("bin")).env("HOME", dir.join("home")));
    assert_eq!(fs::read(dir.join("bin/portmap")).unwrap(), fs::read(built).unwrap());
}

/// The script builds in its own directory.
#[test]
fn relative_paths_are_those_of_the_caller_also_after_a_build() {
    let dir = Dir::new("relative");
    let shell = Shell::dash(&dir);
    let source = source(&dir, &shell);
    program(&shell, "cc", "");
    let artifact = format!(r#"{{"executable":"{}"}}"#, env!("CARGO_BIN_EXE_portmap"));
    program(&shell, "cargo", &format!("printf '%s\\n' '{artifact}'"));
    let before = r#"{"cniVersion": "1.0.0", "name": "x", "plugins": [{"type": "ptp"}]}"#;
    for conflist in ["net.d/10-x.conflist", "auto"] {
        for place in [&dir.0, &source] {
            fs::create_dir_all(place.join("net.d")).unwrap();
            fs::write(place.join("net.d/10-x.conflist"), before).unwrap();
        }
        let mut command = shell.command(&source.join("install.sh"));
        command.args(["--dest", "bin", "--conf-dir", "net.d", "--conflist", conflist]);
        succeeds(command.current_dir(&dir.0).env("HOME", &dir.0));
        assert_eq!(names(&dir.join("bin")), ["portmap"], "{conflist}");
        let read = |place: &Path| fs::read_to_string(place.join("net.d/10-x.conflist")).unwrap();
        assert!(read(&dir.0).contains("\"portmap\""), "{conflist}");
        assert_eq!(read(&source), before, "{conflist}");
    }
}

/// Debian's base has no linker, and Rust brings none.
#[test]
fn what_cargo_links_with_is_installed_where_apt_is() {
    let dir = Dir::new("linker");
    let shell = Shell::dash(&dir);
    let source = source(&dir, &shell);
    let built = dir.portmap("1.0.0", 0);
    let program = |name: &str, script: &str| program(&shell, name, script);
    let (log, cc) = (dir.join("log"), shell.path.join("cc"));
    program(
        "apt-get",
        &format!(
            "echo $* >> {0}\n[ $1 = update ] || {{ : > {1}; chmod 755 {1}; }}",
            log.display(),
            cc.display()
        ),
    );
    program(
        "cargo",
        &format!("[ -e {} ] && echo '{{\"executable\":\"{}\"}}'", cc.display(), built.display()),
    );
    let install = |dest: &str| {
        let mut command = shell.command(&source.join("install.sh"));
        command.arg("--dest").arg(dir.join(dest)).env("HOME", &dir.0);
        command
    };
    // Who is not root is told by cargo.
    program("id", "echo 1000");
    fails(&mut install("nobody"), 1, "cargo could not build portmap");
    assert!(!log.exists());
    program("id", "echo 0");
    let said = succeeds(&mut install("bin"));
    assert!(said.contains("Installing gcc and libc6-dev"), "{said}");
    let asked = fs::read_to_string(&log).unwrap();
    assert!(asked.contains("--no-install-recommends gcc libc6-dev"), "{asked}");
    assert_eq!(fs::read(dir.join("bin/portmap")).unwrap(), fs::read(built).unwrap());
    // It is there now.
    succeeds(&mut install("again"));
    assert_eq!(fs::read_to_string(&log).unwrap(), asked);
}

/// glibc takes longer to start.
#[test]
fn it_is_built_with_musl_where_rust_has_that() {
    let dir = Dir::new("target");
    let shell = Shell::dash(&dir);
    let source = source(&dir, &shell);
    symlink(find("mkdir"), shell.path.join("cc")).unwrap();
    let built = dir.portmap("1.0.0", 0);
    let asked = dir.join("asked");
    let cargo =
        format!("echo $* > {}; echo '{{\"executable\":\"{}\"}}'", asked.display(), built.display());
    program(&shell, "cargo", &cargo);
    let target = |environment: &[(&str, &str)]| {
        let mut command = shell.command(&source.join("install.sh"));
        command.arg("--dest").arg(dir.join("bin")).env("HOME", &dir.0);
        succeeds(command.envs(environment.iter().copied()));
        let asked = fs::read_to_string(&asked).unwrap();
        let (_, target) = asked.split_once("--target ").unwrap();
        target.split_whitespace().next().unwrap().to_owned()
    };
    assert_eq!(target(&[]), "x86_64-unknown-linux-gnu");
    let libraries = dir.join("rustlib/x86_64-unknown-linux-musl");
    // Without a network rustup fails.
    program(&shell, "rustup", "exit 1");
    assert_eq!(target(&[]), "x86_64-unknown-linux-gnu");
    let rustup = format!(
        "[ \"$*\" = 'target add x86_64-unknown-linux-musl' ] && : > {0}/libstd-1.rlib",
        libraries.display()
    );
    program(&shell, "rustup", &rustup);
    // What was left half-way is no library.
    fs::create_dir_all(&libraries).unwrap();
    fs::create_dir_all(dir.join(".rustup")).unwrap();
    // Somebody else's is left alone.
    program(&shell, "id", "echo 12345");
    assert_eq!(target(&[]), "x86_64-unknown-linux-gnu");
    program(&shell, "id", &format!("exec {} \"$@\"", find("id").display()));
    assert_eq!(target(&[]), "x86_64-unknown-linux-musl");
    program(&shell, "rustup", "exit 1");
    assert_eq!(target(&[]), "x86_64-unknown-linux-musl");
    assert_eq!(target(&[("CARGO_BUILD_TARGET", "wherever")]), "wherever");
}

#[test]
#[ignore = "privileged: gives a directory to another user"]
fn under_sudo_the_build_belongs_to_who_called_it() {
    let dir = Dir::new("sudo");
    let shell = Shell::dash(&dir);
    symlink(find("env"), shell.path.join("env")).unwrap();
    let source = source(&dir, &shell);
    std::os::unix::fs::chown(&source, Some(65534), None).unwrap();
    let built = dir.portmap("1.0.0", 0);
    for (name, script) in [
        (
            "sudo",
            format!(
                "echo \"$*\" > {}\nwhile [ \"$1\" != -- ]; do shift; done\nshift\nexec \"$@\"",
                dir.join("log").display()
            ),
        ),
        ("cargo", format!("echo '{{\"executable\":\"{}\"}}'", built.display())),
    ] {
        program(&shell, name, &script);
    }
    let install = || {
        let mut command = shell.command(&source.join("install.sh"));
        command
            .arg("--dest")
            .arg(dir.join("bin"))
            .env("SUDO_USER", "nobody")
            .env("CARGO_TARGET_DIR", "/elsewhere");
        command
    };
    succeeds(&mut install());
    let log = fs::read_to_string(dir.join("log")).unwrap();
    assert!(log.starts_with("-u nobody -H -- env PATH="), "{log}");
    assert!(log.contains(" CARGO_TARGET_DIR=/elsewhere cargo build --release --locked "), "{log}");

    // What root checked out, root builds: nobody else could write there.
    fs::remove_file(dir.join("log")).unwrap();
    std::os::unix::fs::chown(&source, Some(0), None).unwrap();
    succeeds(&mut install());
    assert!(!dir.join("log").exists());
}

#[test]
fn replaces_a_running_program() {
    let dir = Dir::new("running");
    for shell in Shell::both(&dir) {
        let (new, dest) = (dir.portmap("1.0.0", 0), dir.join("bin"));
        fs::create_dir_all(&dest).unwrap();
        // cp, because a file that this process had open for writing may still be open in a child
        // that another test's thread is just starting.
        let copied =
            Command::new("cp").arg(find("sleep")).arg(dest.join("portmap")).status().unwrap();
        assert!(copied.success());
        let mut running = Running(Command::new(dest.join("portmap")).arg("600").spawn().unwrap());

        let said = succeeds(&mut shell.install(&new, &dest));
        assert!(said.contains("replaces another one there: sleep"), "{said}");
        assert_eq!(fs::read(dest.join("portmap")).unwrap(), fs::read(&new).unwrap());
        assert!(running.0.try_wait().unwrap().is_none(), "the running one runs on");
        fs::remove_file(dest.join("portmap")).unwrap();
    }
}

#[test]
fn names_the_versions_of_an_upgrade() {
    let dir = Dir::new("upgrade");
    let shell = Shell::dash(&dir);
    succeeds(&mut shell.install(&dir.portmap("1.0.0", 0), &dir.join("bin")));
    let said = succeeds(&mut shell.install(&dir.portmap("2.0.0", 0), &dir.join("bin")));
    assert!(said.contains("(portmap 2.0.0)") && said.contains("portmap 1.0.0"), "{said}");
}

#[test]
fn refuses_what_is_not_a_working_portmap() {
    let dir = Dir::new("refuse");
    for shell in Shell::both(&dir) {
        let dest = dir.join("bin");
        let old = dir.portmap("1.0.0", 0);
        succeeds(&mut shell.install(&old, &dest));

        let program = |name: &str, content: &[u8]| {
            fs::write(dir.join(name), content).unwrap();
            dir.join(name)
        };
        // Would run as a shell script if it were started: the kernel does not know it.
        let mut foreign = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0\xee\xee\n".to_vec();
        foreign.extend_from_slice(
            format!("echo portmap 6.6.6; : > {}\n", dir.join("ran").display()).as_bytes(),
        );
        for (binary, message) in [
            (dir.join("missing"), "does not exist"),
            (dir.0.clone(), "is not a file"),
            (find("true"), "not a portmap of this project"),
            (
                program("fails", b"#!/bin/sh\necho portmap 9.9.9\nexit 3\n"),
                "does not run on this machine (status 3)",
            ),
            (program("silent", b"#!/bin/sh\n"), "says: nothing"),
            (program("foreign", &foreign), "built for another one"),
        ] {
            fails(&mut shell.install(&binary, &dest), 1, message);
            assert_eq!(fs::read(dest.join("portmap")).unwrap(), fs::read(&old).unwrap());
            assert_eq!(names(&dest), ["portmap"]);
        }
        assert!(!dir.join("ran").exists());
    }
}

#[test]
fn refuses_a_destination_that_cannot_be() {
    let dir = Dir::new("destination");
    for shell in Shell::both(&dir) {
        let new = dir.portmap("1.0.0", 0);
        fails(&mut shell.install(&new, &new), 1, "does not exist and cannot be created");
        fs::create_dir_all(dir.join("bin/portmap")).unwrap();
        fails(&mut shell.install(&new, &dir.join("bin")), 1, "portmap is a directory");
        assert_eq!(names(&dir.join("bin")), ["portmap"]);
        assert_eq!(names(&dir.join("bin/portmap")), [""; 0]);
    }
}

#[test]
fn uninstalls_once_and_has_then_nothing_to_do() {
    let dir = Dir::new("uninstall");
    for shell in Shell::both(&dir) {
        let dest = dir.join("bin");
        succeeds(&mut shell.install(&dir.portmap("1.0.0", 0), &dest));
        let uninstall = || {
            let mut command = shell.command(Path::new(INSTALL));
            command.arg("--uninstall").arg("--dest").arg(&dest);
            command
        };
        assert!(succeeds(&mut uninstall()).contains("Removed"));
        assert_eq!(names(&dest), [""; 0]);
        assert!(succeeds(&mut uninstall()).contains("nothing to do"));

        // The plugin of the distribution has the same name.
        write_executable(&dest.join("portmap"), fs::read(find("true")).unwrap());
        fails(&mut uninstall(), 1, "was left alone");
        assert_eq!(names(&dest), ["portmap"]);
        fs::remove_file(dest.join("portmap")).unwrap();
    }
}

#[test]
fn removes_what_killed_runs_left_and_nothing_else() {
    let dir = Dir::new("stale");
    for shell in Shell::both(&dir) {
        let dest = dir.join("bin");
        fs::create_dir_all(&dest).unwrap();
        let mut dead = Command::new(find("true")).spawn().unwrap();
        let dead_id = dead.id();
        dead.wait().unwrap();
        let live = format!(".portmap.{}", std::process::id());
        for name in
            [format!(".portmap.{dead_id}"), live.clone(), ".portmap.conf".into(), "bridge".into()]
        {
            fs::write(dest.join(name), "").unwrap();
        }
        succeeds(&mut shell.install(&dir.portmap("1.0.0", 0), &dest));
        assert_eq!(names(&dest), [live.as_str(), ".portmap.conf", "bridge", "portmap"]);
        fs::remove_dir_all(dest).unwrap();
    }
}

#[test]
fn a_kill_leaves_the_old_one_or_the_new_one() {
    const KILLS: u32 = 50;
    let dir = Dir::new("kill");
    let dest = dir.join("bin");
    let binaries = [dir.portmap("1.0.0", 8 << 20), dir.portmap("2.0.0", 8 << 20)];
    let contents = binaries.each_ref().map(|path| fs::read(path).unwrap());
    for shell in Shell::both(&dir) {
        succeeds(&mut shell.install(&binaries[0], &dest));
        let start = Instant::now();
        succeeds(&mut shell.install(&binaries[1], &dest));
        let whole = start.elapsed();

        let (mut replaced, mut left_over) = (0, 0);
        for kill in 0..KILLS {
            let before = fs::read(dest.join("portmap")).unwrap();
            let new = usize::from(before == contents[0]);
            let mut run = shell
                .install(&binaries[new], &dest)
                .process_group(0)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            // Spread over the whole run, and a little beyond its end.
            std::thread::sleep(whole.mul_f64(f64::from(kill) / f64::from(KILLS) * 1.2));
            killpg(Pid::from_raw(i32::try_from(run.id()).unwrap()), Signal::SIGKILL).unwrap();
            run.wait().unwrap();

            let after = fs::read(dest.join("portmap")).unwrap();
            assert!(after == contents[new] || after == before, "half a file after kill {kill}");
            assert_eq!(
                fs::metadata(dest.join("portmap")).unwrap().permissions().mode() & 0o7777,
                0o755
            );
            replaced += u32::from(after != before);
            let others = names(&dest).len() - 1;
            assert!(others <= 1, "what earlier runs left is still there: {:?}", names(&dest));
            left_over += others;
        }
        // Otherwise the kills came too early or too late to mean anything.
        assert!(
            replaced < KILLS && left_over > 0,
            "{replaced} replaced, {left_over} left a temporary file"
        );

        succeeds(&mut shell.install(&binaries[0], &dest));
        assert_eq!(fs::read(dest.join("portmap")).unwrap(), contents[0]);
        assert_eq!(names(&dest), ["portmap"]);
    }
}

#[test]
fn an_interrupted_run_clears_up() {
    let dir = Dir::new("interrupt");
    for shell in Shell::both(&dir) {
        let dest = dir.join("bin");
        // Takes its time to tell its version: a moment that is easily met.
        let slow = dir.join("slow");
        let script = format!(
            "#!/bin/sh\n: > {}\n{} 1\necho portmap 1.0.0\n",
            dir.join("asked").display(),
            find("sleep").display()
        );
        fs::write(&slow, script).unwrap();
        let mut run = shell
            .install(&slow, &dest)
            .process_group(0)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while !dir.join("asked").exists() {
            assert!(Instant::now() < deadline, "the version was never asked for");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(names(&dest).len(), 1);
        killpg(Pid::from_raw(i32::try_from(run.id()).unwrap()), Signal::SIGTERM).unwrap();
        assert!(!run.wait().unwrap().success());
        assert_eq!(names(&dest), [""; 0]);
        fs::remove_file(dir.join("asked")).unwrap();
    }
}

#[test]
fn misuse_is_told_apart_from_failure() {
    let dir = Dir::new("misuse");
    for shell in Shell::both(&dir) {
        for (arguments, message) in [
            (&["--binary"][..], "--binary needs a value"),
            (&["--dest", ""], "--dest needs a value"),
            (&["--frobnicate"], "unknown argument: --frobnicate"),
            (&["--uninstall", "--demo"], "--uninstall goes with --dest only"),
            (&["--force"], "--force goes with --uninstall"),
            (&["--url", "http://x/portmap"], "--url and --sha256 go together"),
            (&["--url=x", "--sha256=abc"], "64 hexadecimal digits"),
            (&["--url=x", "--sha256=abc", "--binary=x"], "exclude each other"),
        ] {
            fails(shell.command(Path::new(INSTALL)).args(arguments), 2, message);
        }
        let help = succeeds(shell.command(Path::new(INSTALL)).arg("--help"));
        for option in
            ["--binary", "--dest", "--demo", "--uninstall", "CNI_BIN_DIR", "--url", "--conflist"]
        {
            assert!(help.contains(option), "{option} is not in the help");
        }
    }
}

/// Serves one file over HTTP, to whoever asks for anything, while the test runs.
fn serve(content: Vec<u8>) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection = connection.unwrap();
            let mut request = std::io::BufReader::new(connection.try_clone().unwrap());
            let mut line = String::new();
            while std::io::BufRead::read_line(&mut request, &mut line).unwrap() > 2 {
                line.clear();
            }
            let head = format!(
                "HTTP/1.0 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                content.len()
            );
            // A client that leaves early is its own business.
            drop(
                connection.write_all(head.as_bytes()).and_then(|()| connection.write_all(&content)),
            );
        }
    });
    format!("http://{address}")
}

fn sha256(path: &Path) -> String {
    let output = Command::new(find("sha256sum")).arg(path).output().unwrap();
    text(&output.stdout)[..64].to_owned()
}

#[test]
fn a_download_is_verified_before_anything_is_done_with_it() {
    let dir = Dir::new("url");
    let [dash, busybox] = Shell::both(&dir);
    for tool in ["curl", "tar", "gzip"] {
        symlink(find(tool), dash.path.join(tool)).unwrap();
    }
    let binary = dir.portmap("1.0.0", 0);
    let release = dir.join("release/portmap-1.0.0");
    fs::create_dir_all(&release).unwrap();
    fs::copy(&binary, release.join("portmap")).unwrap();
    let archive = dir.join("release.tar.gz");
    let mut tar = Command::new("tar");
    tar.arg("-czf").arg(&archive).arg("-C").arg(dir.join("release")).arg("portmap-1.0.0");
    assert!(tar.status().unwrap().success());
    let urls = [
        (format!("{}/portmap", serve(fs::read(&binary).unwrap())), sha256(&binary)),
        (format!("{}/portmap.tar.gz", serve(fs::read(&archive).unwrap())), sha256(&archive)),
    ];
    let tmp = dir.join("tmp");
    fs::create_dir_all(&tmp).unwrap();
    // curl in one, wget in the other.
    for shell in [dash, busybox] {
        for (url, hash) in &urls {
            let dest = dir.join("bin");
            let install = |url: &str, hash: &str| {
                let mut command = shell.command(Path::new(INSTALL));
                command.args(["--url", url, "--sha256", hash, "--dest"]).arg(&dest);
                command.env("TMPDIR", &tmp);
                command
            };
            fails(&mut install(url, &"0".repeat(64)), 1, "nothing was installed");
            assert!(!dest.exists());
            fails(&mut install("http://127.0.0.1:1/portmap", hash), 1, "cannot download");
            let said = succeeds(&mut install(url, &hash.to_uppercase()));
            assert!(said.contains("(portmap 1.0.0)"), "{said}");
            assert!(fs::read(dest.join("portmap")).unwrap() == fs::read(&binary).unwrap());
            assert_eq!(names(&tmp), [""; 0]);
            fs::remove_dir_all(dest).unwrap();
        }
    }
}

#[test]
fn with_the_real_binary_lists_are_changed_and_looked_at() {
    let dir = Dir::new("real");
    let real = Path::new(env!("CARGO_BIN_EXE_portmap"));
    let list = dir.join("net.d/10-x.conflist");
    for shell in Shell::both(&dir) {
        fs::create_dir_all(dir.join("net.d")).unwrap();
        let before = r#"{"cniVersion": "1.0.0", "name": "x", "plugins": [{"type": "ptp"}]}"#;
        fs::write(&list, before).unwrap();
        let dest = dir.join("bin");
        let mut command = shell.install(real, &dest);
        command.args(["--conflist", "auto", "--conf-dir"]).arg(dir.join("net.d"));
        let said = succeeds(&mut command);
        assert!(said.contains("put portmap behind ptp"), "{said}");
        let uninstall = |conflist: &[&str]| {
            let mut command = shell.command(Path::new(INSTALL));
            command.arg("--uninstall").arg("--dest").arg(&dest).args(conflist);
            command.arg("--conf-dir").arg(dir.join("net.d"));
            command
        };
        fails(&mut uninstall(&[]), 1, "10-x.conflist names it");
        assert_eq!(names(&dest), ["portmap"]);
        succeeds(&mut uninstall(&["--conflist=auto", "--force"]));
        assert_eq!(fs::read_to_string(&list).unwrap(), before);
        assert_eq!(names(&dest), [""; 0]);
    }
}

#[test]
fn a_list_that_names_a_binary_which_is_gone_is_not_nothing_to_do() {
    let dir = Dir::new("gone");
    let names_it = r#"{"name": "x", "plugins": [{"type": "ptp"},{"type": "portmap"}]}"#;
    for (i, shell) in Shell::both(&dir).iter().enumerate() {
        let conf_dir = dir.join(&format!("net{i}.d"));
        fs::create_dir_all(&conf_dir).unwrap();
        let list = conf_dir.join("10-x.conflist");
        let script = dir.join(&format!("release{i}/install.sh"));
        fs::create_dir_all(script.parent().unwrap()).unwrap();
        write_executable(&script, fs::read(INSTALL).unwrap());
        let uninstall = |conflist: &str| {
            let mut command = shell.command(&script);
            command.args(["--uninstall", "--conflist", conflist, "--dest"]).arg(dir.join("bin"));
            command.arg("--conf-dir").arg(&conf_dir);
            command
        };
        fs::write(&list, names_it).unwrap();
        for conflist in ["auto", list.to_str().unwrap()] {
            fails(&mut uninstall(conflist), 1, "10-x.conflist names portmap, and there is no");
        }
        assert_eq!(fs::read_to_string(&list).unwrap(), names_it);
        // That of a release can do it.
        fs::hard_link(env!("CARGO_BIN_EXE_portmap"), script.with_file_name("portmap")).unwrap();
        let said = succeeds(&mut uninstall("auto"));
        assert!(said.contains("took portmap out") && said.contains("is not installed"), "{said}");
        assert_eq!(
            fs::read_to_string(&list).unwrap(),
            r#"{"name": "x", "plugins": [{"type": "ptp"}]}"#
        );
        assert!(succeeds(&mut uninstall("auto")).contains("nothing to do"));
        fs::remove_file(script.with_file_name("portmap")).unwrap();
        assert!(succeeds(&mut uninstall("auto")).contains("nothing to do"));
    }
}

#[test]
fn the_demo_runs_from_where_it_was_installed() {
    let dir = Dir::new("demo");
    let shell = Shell::dash(&dir);
    let new = dir.join("new");
    let script =
        "#!/bin/sh\ncase $1 in --version) echo portmap 1.0.0;; *) echo \"$0 $*\"; exit 7;; esac\n";
    fs::write(&new, script).unwrap();
    let output = shell.install(&new, &dir.join("bin")).arg("--demo").output().unwrap();
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert!(text(&output.stdout).ends_with("bin/portmap demo\n"), "{output:?}");
}

/// Runs `body` with `$dest` on a fresh tmpfs that only this script sees. `$install` is the script
/// under the given shell with `--dest`; `$old` and `$new` are two portmaps.
fn on_tmpfs(dir: &Dir, shell: &Shell, options: &str, body: &str) {
    let mount = dir.join("mount");
    fs::create_dir_all(&mount).unwrap();
    let argv: Vec<String> = shell.argv.iter().map(|arg| arg.display().to_string()).collect();
    let script = format!(
        "set -eu; dest='{mount}'; old='{old}'; new='{new}'
         mount -t tmpfs -o {options} none \"$dest\"
         install() {{ PATH='{path}' {shell} {INSTALL} --dest \"$dest\" \"$@\"; }}
         fails() {{ message=$1; shift; if said=$(install \"$@\" 2>&1); then echo \"succeeded: $said\"; exit 1; fi
             case $said in *\"$message\"*) ;; *) echo \"says: $said\"; exit 1;; esac; }}
         {body}",
        mount = mount.display(),
        old = dir.portmap("1.0.0", 30 << 10).display(),
        new = dir.portmap("2.0.0", 90 << 10).display(),
        path = shell.path.display(),
        shell = argv.join(" "),
    );
    let output = Command::new("unshare")
        .args(["-m", "--propagation", "private", "sh", "-c", &script])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
#[ignore = "privileged: mounts file systems in a mount namespace of its own"]
fn a_read_only_directory_is_named_as_such() {
    let dir = Dir::new("read-only");
    for shell in Shell::both(&dir) {
        on_tmpfs(
            &dir,
            &shell,
            "size=1m",
            "install --binary $old; mount -o remount,ro $dest
             fails 'read-only file system: choose a writable directory' --binary $new
             fails 'read-only file system: choose a writable directory' --uninstall
             fails 'cannot be created' --binary $new --dest $dest/sub
             cmp $old $dest/portmap
             # Nothing to write, so nothing to fail.
             install --binary $old",
        );
    }
}

#[test]
#[ignore = "privileged: mounts file systems in a mount namespace of its own"]
fn a_full_disk_keeps_the_old_one() {
    let dir = Dir::new("full");
    for shell in Shell::both(&dir) {
        on_tmpfs(
            &dir,
            &shell,
            "size=64k",
            "install --binary $old
             fails 'is full' --binary $new
             cmp $old $dest/portmap; [ \"$(ls -A $dest)\" = portmap ]",
        );
    }
}

#[test]
#[ignore = "privileged: mounts file systems in a mount namespace of its own"]
fn a_directory_that_nothing_runs_from_is_noticed_before_the_runtime_does() {
    let dir = Dir::new("noexec");
    for shell in Shell::both(&dir) {
        on_tmpfs(
            &dir,
            &shell,
            "size=1m,noexec",
            "fails 'nothing can be run from' --binary $new
             [ -z \"$(ls -A $dest)\" ]",
        );
    }
}

#[test]
#[ignore = "privileged: becomes another user"]
fn without_permission_it_says_who_may() {
    let dir = Dir::new("permission");
    for shell in Shell::both(&dir) {
        on_tmpfs(
            &dir,
            &shell,
            "size=1m,mode=755",
            "cp $new $dest/source; cp INSTALL $dest/install.sh; mkdir $dest/bin
             # Nobody else may look into /root, where this may be.
             mount --bind $dest /mnt
             if said=$(cd /mnt && setpriv --reuid 65534 --regid 65534 --clear-groups \
                 dash ./install.sh --binary /mnt/source --dest /mnt/bin 2>&1); then exit 1; fi
             case $said in *'run this as root'*) ;; *) echo \"says: $said\"; exit 1;; esac"
                .replace("INSTALL", INSTALL)
                .as_str(),
        );
    }
}
