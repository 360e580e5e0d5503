// Package tests holds Aqueduct's own Complement tests: behaviour that upstream's suite does not pin down.
package tests

import (
	"testing"

	"github.com/matrix-org/complement"
)

func TestMain(m *testing.M) {
	complement.TestMain(m, "aqueduct")
}
