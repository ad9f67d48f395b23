// The script of every page of the board. Texts from the server are put in as text; HTML comes from its templates alone.
'use strict';
const find = (selector, inside = document) => inside.querySelector(selector);
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];

// The token has become a cookie, and leaves the address, which people copy and photograph.
const address = new URL(location.href);
if (address.searchParams.has('token')) {
  address.searchParams.delete('token');
  history.replaceState(null, '', address);
}

// Parts of the page that change. What a person has opened, marked, scrolled or is typing into stays.
const HELD = 'a, button, input, summary, [tabindex]';
function show(parts) {
  for (const [id, html] of Object.entries(parts)) {
    const part = document.getElementById(id);
    if (!part) continue;
    const marked = new Set(all('input:checked', part).map(input => input.value));
    const open = new Set(all('details', part).map((one, at) => one.open ? at : -1));
    const focused = document.activeElement, held = part.contains(focused) ? all(HELD, part).indexOf(focused) : -1;
    const scrolled = all('.scroll', part).map(one => one.scrollLeft);
    part.innerHTML = html;
    all('.scroll', part).forEach((one, at) => { one.scrollLeft = scrolled[at] ?? 0; });
    all('input[type=checkbox]', part).forEach(input => { input.checked = marked.has(input.value); });
    all('details', part).forEach((one, at) => { one.open = open.has(at); });
    if (held >= 0) all(HELD, part)[held]?.focus();
  }
}

// Text that grows, of which the end stays in sight if it was.
function append(texts) {
  for (const [id, text] of Object.entries(texts)) {
    const part = document.getElementById(id);
    if (!part) continue;
    const follows = part.scrollTop + part.clientHeight >= part.scrollHeight - 8;
    part.textContent = (part.textContent + text).slice(-500000);
    if (follows) part.scrollTop = part.scrollHeight;
  }
}

// A page that nobody sees listens to nothing, except to what was started: a conversation ends when nobody listens.
// Each stream begins with all that it shows, so it can begin again.
function listen(url) {
  let source = null;
  const heard = (kind, use) => source.addEventListener(kind, event => use(JSON.parse(event.data)));
  const stop = () => { source?.close(); source = null; };
  const change = () => {
    if (document.hidden && !url.startsWith('/started/')) stop();
    else if (!source) {
      source = new EventSource(url);
      source.onerror = () => show({ trouble: 'The board does not answer.' });
      source.onopen = () => show({ trouble: '' });
      heard('parts', show);
      heard('text', append);
      heard('end', end);
    }
  };
  const end = () => { stop(); document.removeEventListener('visibilitychange', change); };
  document.addEventListener('visibilitychange', change);
  change();
  return end;
}
const live = find('#trouble').dataset.events;
if (live) listen(live);

// Forms are sent as JSON. The answer says what to show, what to fill in, and where to listen or to go.
const fieldsOf = (form, button) => Object.fromEntries(new FormData(form, button));
let started = () => {};
async function send(form, button = null, more = {}) {
  const told = find('[role=status]', form), mine = (form.asked ?? 0) + 1;
  form.asked = mine;
  told.textContent = form.dataset.wait ?? '';
  try {
    const given = { ...(form.dataset.with && fieldsOf(document.getElementById(form.dataset.with))), ...fieldsOf(form, button), ...more };
    const answer = await fetch(more.to ?? button?.getAttribute('formaction') ?? form.dataset.send, {
      method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(given),
    });
    const found = await answer.json().catch(() => ({ error: `the board answers ${answer.status}` }));
    if (mine !== form.asked) return false; // something newer has been asked
    if (!answer.ok) throw new Error(found.error);
    told.textContent = '';
    show(found.parts ?? {});
    for (const [name, value] of Object.entries(found.values ?? {})) find(`[name=${name}]`).value = value;
    if (found.listen) { started(); started = listen(found.listen); }
    if (found.go) location.href = found.go;
    return true;
  } catch (error) {
    if (mine === form.asked) told.textContent = error.message;
    return false;
  }
}
const waiting = new Map();
const soon = (form, what, milliseconds) => { clearTimeout(waiting.get(form)); waiting.set(form, setTimeout(what, milliseconds)); };
document.addEventListener('submit', async event => {
  const form = event.target;
  if (!form.dataset.send) return;
  event.preventDefault();
  const sent = send(form, event.submitter);
  if ('resets' in form.dataset) form.reset();
  if (await sent) form.closest('dialog')?.close();
});
document.addEventListener('input', event => {
  const form = event.target.form;
  if (form && 'look' in form.dataset) soon(form, () => send(form, null, { look: true }), 100);
});

// Dialogs. Each shows its command from the beginning.
document.addEventListener('click', event => {
  const opens = event.target.closest('[data-opens]')?.dataset.opens;
  if (opens) {
    document.getElementById(opens).showModal();
    send(find(`#${opens} form`), null, { look: true });
  }
  if (event.target.closest('[data-closes]')) event.target.closest('dialog').close();
});

// The form of a first run: the plan follows each change, at first by what is quickly known.
const draft = find('#draft');
if (draft) {
  const config = find('#config');
  const plan = async () => {
    for (const look of ['quick', 'whole']) if (!await send(config, null, { to: '/new/plan', look })) return;
  };
  const make = async () => { if (draft.elements.base.value && draft.elements.data.value && await send(draft)) plan(); };
  draft.addEventListener('change', () => soon(draft, make, 50));
  config.elements.config.addEventListener('input', () => soon(config, plan, 300));
  draft.elements.data.addEventListener('input', async () => {
    const names = await (await fetch(`/new/files?at=${encodeURIComponent(draft.elements.data.value)}`)).json();
    find('#files').replaceChildren(...names.map(name => Object.assign(document.createElement('option'), { value: name })));
  });
}
