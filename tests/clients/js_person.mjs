// A person who uses matrix-js-sdk (what Element Web is built on), driven as obey.py says by talk.py, e2ee/ and media/.
import * as sdk from "matrix-js-sdk";
import { cryptoCommands, cryptoOptions, watchCrypto } from "./js_crypto.mjs";
import { mediaCommands } from "./js_media.mjs";
import { obey, saw } from "./obey.mjs";

const baseUrl = process.argv[2];
const broken = (problem) => saw({ kind: "broken", problem: String(problem?.stack ?? problem) });
process.on("uncaughtException", broken);
process.on("unhandledRejection", broken);
let client = sdk.createClient({ baseUrl });

const text = (body) => ({ msgtype: "m.text", body });
const sent = async (answer) => ({ event: (await answer).event_id });

const commands = {
  async register({ user, password }) {
    const answer = await client.registerRequest({ username: user, password, auth: { type: "m.login.dummy" } });
    return { user: answer.user_id };
  },
  async login({ user, password }) {
    const identifier = { type: "m.id.user", user };
    const answer = await client.loginRequest({ type: "m.login.password", identifier, password });
    const { access_token: accessToken, user_id: userId, device_id: deviceId } = answer;
    client = sdk.createClient({ baseUrl, accessToken, userId, deviceId, timelineSupport: true, ...cryptoOptions });
    await client.initRustCrypto({ useIndexedDB: false });
    watch();
    watchCrypto(client);
    await client.startClient({ initialSyncLimit: 20, lazyLoadMembers: true, threadSupport: true });
    return { user: userId, device: deviceId };
  },
  async logout() {
    client.stopClient();
    await client.logout();
  },
  async create_room({ name, invite = [], encrypted = false }) {
    const encryption = { type: "m.room.encryption", state_key: "", content: { algorithm: "m.megolm.v1.aes-sha2" } };
    const initial_state = encrypted ? [encryption] : [];
    return { room: (await client.createRoom({ name, preset: "private_chat", invite, initial_state })).room_id };
  },
  invite: ({ room, user }) => client.invite(room, user),
  join: async ({ room }) => void (await client.joinRoom(room)),
  leave: ({ room }) => client.leave(room),
  forget: ({ room }) => client.forget(room),
  kick: ({ room, user, reason }) => client.kick(room, user, reason),
  ban: ({ room, user, reason }) => client.ban(room, user, reason),
  unban: ({ room, user }) => client.unban(room, user),
  send: ({ room, body }) => sent(client.sendMessage(room, text(body))),
  edit: ({ room, event, body }) =>
    sent(
      client.sendMessage(room, {
        ...text(`* ${body}`),
        "m.new_content": text(body),
        "m.relates_to": { rel_type: "m.replace", event_id: event },
      }),
    ),
  react: ({ room, event, key }) =>
    sent(
      client.sendEvent(room, "m.reaction", {
        "m.relates_to": { rel_type: "m.annotation", event_id: event, key },
      }),
    ),
  redact: ({ room, event }) => sent(client.redactEvent(room, event, undefined, { reason: "no longer so" })),
  typing: ({ room, on }) => client.sendTyping(room, on, 20_000),
  read: ({ room, event }) => client.sendReadReceipt(client.getRoom(room).findEventById(event)),
  set_name: ({ room, name }) => client.setRoomName(room, name),
  set_topic: ({ room, topic }) => client.setRoomTopic(room, topic),
  async members({ room }) {
    return { users: Object.keys((await client.getJoinedRoomMembers(room)).joined).sort() };
  },
  // The bodies of all messages one can page back to, oldest first; edited messages as they are now.
  async history({ room }) {
    const bodies = [];
    let start = null;
    for (;;) {
      const page = await client.createMessagesRequest(room, start, 7, "b");
      bodies.push(...page.chunk.filter((e) => e.type === "m.room.message" && e.content.body).map((e) => e.content.body));
      if (!page.end || page.chunk.length === 0) return { bodies: bodies.reverse() };
      start = page.end;
    }
  },
  ...cryptoCommands,
  ...mediaCommands(() => client),
};

function watch() {
  client.on(sdk.ClientEvent.Sync, (state, _, data) => {
    // A server that is away comes back, and what is missed then fails for itself.
    if (state === "ERROR" && !(data?.error instanceof sdk.ConnectionError)) broken(data?.error);
    client.getRooms().forEach(typingNews);
  });
  client.on(sdk.ClientEvent.SyncUnexpectedError, broken);
  client.on(sdk.RoomEvent.MyMembership, (room, membership) => {
    const sender = room.getMember(client.getUserId())?.events.member?.getSender();
    saw({ kind: "mine", room: room.roomId, membership, sender });
  });
  client.on(sdk.RoomEvent.Timeline, (event, room, _, removed) => {
    // An echo of what is being sent has no number yet; it comes again, as all see it.
    if (!removed && !event.status) timelineNews(event, room);
  });
  client.on(sdk.RoomEvent.LocalEchoUpdated, (event, room) => {
    if (!event.status) timelineNews(event, room);
  });
  // An event that came encrypted is news once its key is there.
  client.on(sdk.MatrixEventEvent.Decrypted, (event) => {
    if (!event.status) timelineNews(event, client.getRoom(event.getRoomId()));
  });
  client.on(sdk.RoomStateEvent.Members, (event, _, member) => {
    if (member.userId === client.getUserId()) return;
    saw({ kind: "member", room: member.roomId, sender: event.getSender(), user: member.userId, membership: member.membership });
  });
  client.on(sdk.RoomStateEvent.Events, (event) => {
    const room = event.getRoomId();
    if (event.getType() === "m.room.name") saw({ kind: "name", room, name: client.getRoom(room)?.name });
    if (event.getType() === "m.room.topic") saw({ kind: "topic", room, topic: event.getContent().topic });
  });
  // The room's shown name follows its event a moment later.
  client.on(sdk.RoomEvent.Name, (room) => saw({ kind: "name", room: room.roomId, name: room.name }));
  client.on(sdk.RoomEvent.Receipt, (event, room) => {
    for (const [id, kinds] of Object.entries(event.getContent()))
      for (const user of Object.keys(kinds["m.read"] ?? {}))
        saw({ kind: "receipt", room: room.roomId, user, event: id });
  });
}

// Who types is looked up after each sync: members that came with an invite emit no event of it.
const typing = new Map();
function typingNews(room) {
  const users = room.currentState
    .getMembers()
    .filter((member) => member.typing)
    .map((member) => member.userId)
    .sort();
  if ((typing.get(room.roomId) ?? []).join() === users.join()) return;
  typing.set(room.roomId, users);
  saw({ kind: "typing", room: room.roomId, users });
}

function timelineNews(event, room) {
  if (event.isDecryptionFailure())
    return saw({ kind: "undecrypted", room: room?.roomId, event: event.getId(), problem: event.decryptionFailureReason });
  const seen = { room: room?.roomId, sender: event.getSender() };
  const content = event.getContent();
  const relation = event.getRelation();
  switch (event.getType()) {
    case "m.room.message":
      if (relation?.rel_type === "m.replace")
        saw({ kind: "edit", ...seen, of: relation.event_id, body: content["m.new_content"].body });
      else if (!event.isRedacted())
        saw({ kind: "message", ...seen, event: event.getId(), body: content.body, encrypted: event.isEncrypted() });
      break;
    case "m.reaction":
      if (!event.isRedacted()) saw({ kind: "reaction", ...seen, to: relation.event_id, key: relation.key });
      break;
    case "m.room.redaction":
      saw({ kind: "redaction", ...seen, of: event.getAssociatedId() });
      break;
  }
}

await obey(commands);
client.stopClient();
process.exit(0);
