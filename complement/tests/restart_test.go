package tests

import (
	"fmt"
	"testing"

	"github.com/matrix-org/complement"
	"github.com/matrix-org/complement/b"
	"github.com/matrix-org/complement/client"
	"github.com/matrix-org/complement/helpers"
	"github.com/matrix-org/complement/must"
	"github.com/tidwall/gjson"
)

// After a restart the access token, the sync token and the transaction ids of before are still good, and nothing is lost.
func TestRestartForgetsNothing(t *testing.T) {
	deployment := complement.Deploy(t, 1)
	defer deployment.Destroy(t)
	alice := deployment.Register(t, "hs1", helpers.RegistrationOpts{LocalpartSuffix: "restart"})
	roomID := alice.MustCreateRoom(t, map[string]any{"name": "Before"})
	_, since := alice.MustSync(t, client.SyncReq{TimeoutMillis: "0"})
	message := b.Event{Type: "m.room.message", Content: map[string]any{"msgtype": "m.text", "body": "kept"}}
	var eventIDs []string
	for i := range 10 {
		eventIDs = append(eventIDs, alice.Unsafe_SendEventUnsyncedWithTxnID(t, roomID, message, fmt.Sprintf("before-%d", i)))
	}
	alice.MustSetGlobalAccountData(t, "org.example.kept", map[string]any{"kept": true})

	deployment.StopServer(t, "hs1")
	deployment.StartServer(t, "hs1")

	for i, eventID := range eventIDs {
		again := alice.Unsafe_SendEventUnsyncedWithTxnID(t, roomID, message, fmt.Sprintf("before-%d", i))
		must.Equal(t, again, eventID, "the event of a transaction id of before the restart")
	}
	news, _ := alice.MustSync(t, client.SyncReq{Since: since, TimeoutMillis: "0"})
	var seen []string
	for _, event := range news.Get("rooms.join." + client.GjsonEscape(roomID) + ".timeline.events").Array() {
		seen = append(seen, event.Get("event_id").Str)
	}
	must.Equal(t, fmt.Sprint(seen), fmt.Sprint(eventIDs), "what the sync token of before the restart leads to")
	kept := news.Get(`account_data.events.#(type=="org.example.kept").content.kept`)
	must.Equal(t, kept.Bool(), true, "account data of before the restart")
	name := alice.MustGetStateEventContent(t, roomID, "m.room.name", "")
	must.Equal(t, gjson.Get(name.Raw, "name").Str, "Before", "the room's name")
}
