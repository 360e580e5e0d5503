package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const (
	upstream = "github.com/matrix-org/complement/"
	ours     = "aqueduct/complement/tests"
)

// suite is every package: upstream's, those of unstable proposals included, and ours.
var suite = []string{upstream + "tests/...", ours}

// shortName is how results.tsv names a package.
func shortName(pkg string) string {
	if pkg == ours {
		return "aqueduct"
	}
	return strings.TrimPrefix(pkg, upstream)
}

func longName(short string) string {
	if short == "aqueduct" {
		return ours
	}
	return upstream + short
}

// event is one line of `go test -json`.
type event struct {
	Action  string
	Package string
	Test    string
	Output  string
	Elapsed float64
}

// runSuite runs the matching groups of these packages, prints a line for each that ends, and leaves what the failing ones
// printed in the logs' directory, one file a group.
func runSuite(packages []string, run, logs string) (table, error) {
	arguments := append([]string{"test", "-json", "-count=1", "-p=1", "-timeout=40m", "-run=" + run}, packages...)
	cmd := exec.Command("go", arguments...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	results, broken := table{}, []string{}
	output := map[test]*strings.Builder{}
	lines := bufio.NewReader(out)
	for {
		line, readErr := lines.ReadBytes('\n')
		if readErr != nil {
			break
		}
		var e event
		if json.Unmarshal(line, &e) != nil {
			fmt.Printf("%s", line)
			continue
		}
		group := test{e.Package, e.Test}.group()
		switch e.Action {
		case "output", "build-output":
			if output[group] == nil {
				output[group] = &strings.Builder{}
			}
			output[group].WriteString(e.Output)
		case "pass", "fail", "skip":
			if e.Test != "" {
				results[test{e.Package, e.Test}] = outcome(e.Action)
			} else if e.Action == "fail" && !anyFailed(results, e.Package) {
				broken = append(broken, e.Package) // it was not built, or ended outside of any test
			}
			if e.Test == group.name {
				finish(group, e, output[group], logs)
				delete(output, group)
			}
		}
	}
	// go test ends with 1 when a test fails, which is for the comparison to judge.
	if err := cmd.Wait(); err != nil && len(results) == 0 {
		return nil, fmt.Errorf("go test: %w", err)
	}
	if len(broken) > 0 {
		return nil, fmt.Errorf("did not run: %s; the logs are in %s", strings.Join(broken, ", "), logs)
	}
	return results, nil
}

// finish prints how a group (or, without a name, a package) ended and keeps or removes its log.
func finish(group test, e event, output *strings.Builder, logs string) {
	name := shortName(group.pkg)
	if group.name != "" {
		name += " " + group.name
	}
	if e.Test != "" {
		fmt.Printf("%-4s %s (%.1fs)\n", e.Action, name, e.Elapsed)
	}
	path := filepath.Join(logs, strings.NewReplacer("/", "_", " ", ".").Replace(name)+".log")
	if e.Action != "fail" || output == nil {
		_ = os.Remove(path)
		return
	}
	if err := os.WriteFile(path, []byte(output.String()), 0o644); err != nil {
		fmt.Fprintln(os.Stderr, "complement:", err)
	}
}

func anyFailed(results table, pkg string) bool {
	for t, outcome := range results {
		if t.pkg == pkg && outcome == fail {
			return true
		}
	}
	return false
}
