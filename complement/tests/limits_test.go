package tests

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/matrix-org/complement"
	"github.com/matrix-org/complement/client"
	"github.com/matrix-org/complement/helpers"
	"github.com/matrix-org/complement/match"
	"github.com/matrix-org/complement/must"
)

// What a client may send, and how what is too much or malformed is refused.
func TestEventsThatAreRefused(t *testing.T) {
	deployment := complement.Deploy(t, 1)
	defer deployment.Destroy(t)
	alice := deployment.Register(t, "hs1", helpers.RegistrationOpts{LocalpartSuffix: "limits"})
	roomID := alice.MustCreateRoom(t, map[string]any{})
	nested := func(levels int) string {
		return `{"a":` + strings.Repeat("[", levels) + strings.Repeat("]", levels) + `}`
	}
	for i, test := range []struct {
		name, body string
		status     int
		errcode    string
	}{
		{"empty content", `{}`, http.StatusOK, ""},
		{"60,000 bytes", `{"body":"` + strings.Repeat("x", 60_000) + `"}`, http.StatusOK, ""},
		{"an event above 65,536 bytes", `{"body":"` + strings.Repeat("x", 65_536) + `"}`, http.StatusRequestEntityTooLarge, "M_TOO_LARGE"},
		{"a body above 16 MiB", `{"body":"` + strings.Repeat("x", 17<<20) + `"}`, http.StatusRequestEntityTooLarge, "M_TOO_LARGE"},
		{"nesting to 90 levels", nested(90), http.StatusOK, ""},
		{"nesting to 200 levels", nested(200), http.StatusBadRequest, ""},
		{"the largest integer", `{"n":9007199254740991}`, http.StatusOK, ""},
		{"a larger integer", `{"n":9007199254740992}`, http.StatusBadRequest, ""},
		{"a float", `{"n":1.5}`, http.StatusBadRequest, ""},
		{"a lone surrogate", `{"s":"\ud800"}`, http.StatusBadRequest, ""},
		{"a list", `[]`, http.StatusBadRequest, ""},
		{"not JSON", `{"s":`, http.StatusBadRequest, "M_NOT_JSON"},
		{"not UTF-8", "{\"s\":\"\xff\"}", http.StatusBadRequest, "M_NOT_JSON"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := []string{"_matrix", "client", "v3", "rooms", roomID, "send", "org.example.limits", fmt.Sprint("limit-", i)}
			res := alice.Do(t, "PUT", path, client.WithRawBody([]byte(test.body)))
			wanted := match.HTTPResponse{StatusCode: test.status}
			if test.errcode != "" {
				wanted.JSON = append(wanted.JSON, match.JSONKeyEqual("errcode", test.errcode))
			}
			must.MatchResponse(t, res, wanted)
		})
	}
}

// Who may ask is looked at before what is asked.
func TestTokenIsCheckedBeforeBody(t *testing.T) {
	deployment := complement.Deploy(t, 1)
	defer deployment.Destroy(t)
	nobody := deployment.UnauthenticatedClient(t, "hs1")
	res := nobody.Do(t, "POST", []string{"_matrix", "client", "v3", "createRoom"}, client.WithRawBody([]byte("no JSON")))
	must.MatchResponse(t, res, match.HTTPResponse{
		StatusCode: http.StatusUnauthorized,
		JSON:       []match.JSON{match.JSONKeyEqual("errcode", "M_MISSING_TOKEN")},
	})
}

func TestUnknownPathsAndMethods(t *testing.T) {
	deployment := complement.Deploy(t, 1)
	defer deployment.Destroy(t)
	alice := deployment.Register(t, "hs1", helpers.RegistrationOpts{LocalpartSuffix: "paths"})
	for _, test := range []struct {
		method string
		path   []string
		status int
	}{
		{"GET", []string{"_matrix", "client", "v3", "nowhere"}, http.StatusNotFound},
		{"GET", []string{"_matrix", "client", "v99", "sync"}, http.StatusNotFound},
		{"GET", []string{"elsewhere"}, http.StatusNotFound},
		{"DELETE", []string{"_matrix", "client", "v3", "createRoom"}, http.StatusMethodNotAllowed},
		{"POST", []string{"_matrix", "client", "v3", "sync"}, http.StatusMethodNotAllowed},
	} {
		t.Run(test.method+" "+strings.Join(test.path, "_"), func(t *testing.T) {
			res := alice.Do(t, test.method, test.path)
			must.MatchResponse(t, res, match.HTTPResponse{
				StatusCode: test.status,
				JSON:       []match.JSON{match.JSONKeyEqual("errcode", "M_UNRECOGNIZED")},
			})
		})
	}
}
