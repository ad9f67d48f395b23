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

async function ask(url, given) {
  const answer = await fetch(url, {
    method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(given),
  });
  const found = await answer.json().catch(() => ({ error: `the board answers ${answer.status}` }));
  if (!answer.ok) throw new Error(found.error);
  return found;
}
const fieldsOf = form => Object.fromEntries([...new FormData(form)].filter(([name]) => name !== 'dry_run'));
const told = (where, error) => { where.textContent = error ? error.message : ''; };

// Parts of the page that change. What a person has opened, marked or is typing into stays.
function show(parts) {
  for (const [id, html] of Object.entries(parts)) {
    const part = document.getElementById(id);
    if (!part) continue;
    const marked = new Set(all('input:checked', part).map(input => input.value));
    const open = new Set(all('details', part).map((one, at) => one.open ? at : -1));
    const focused = document.activeElement, held = part.contains(focused) ? all('a, button, input, summary, [tabindex]', part).indexOf(focused) : -1;
    part.innerHTML = html;
    all('input[type=checkbox]', part).forEach(input => { input.checked = marked.has(input.value); });
    all('details', part).forEach((one, at) => { one.open = open.has(at); });
    if (held >= 0) all('a, button, input, summary, [tabindex]', part)[held]?.focus();
  }
}

// A page that nobody sees listens to nothing.
function listen(url, heard) {
  let source = null;
  const change = () => {
    if (document.hidden) { source?.close(); source = null; }
    else if (!source) {
      source = new EventSource(url);
      for (const [kind, use] of Object.entries(heard)) source.addEventListener(kind, event => use(JSON.parse(event.data)));
    }
  };
  document.addEventListener('visibilitychange', change);
  change();
}
const live = find('#live')?.dataset.events;
if (live) listen(live, { parts: show });

// A part that takes its time.
const load = find('[data-load]');
if (load) fetch(load.dataset.load).then(answer => answer.text()).then(html => { load.innerHTML = html; }, error => told(load, error));

// Text that grows, of which the end stays in sight if it was.
function append(pre, text) {
  const follows = pre.scrollTop + pre.clientHeight >= pre.scrollHeight - 8;
  pre.textContent = (pre.textContent + text).slice(-500000);
  if (follows) pre.scrollTop = pre.scrollHeight;
}
const log = find('#log');
if (log) {
  let first = true;
  listen(log.dataset.log, { text: text => { if (first || document.hidden) log.textContent = ''; first = false; append(log, text); } });
  document.addEventListener('visibilitychange', () => { first = true; });
}

// What a button has started.
function follow(job, page) {
  const box = find('#job'), pre = find('pre', box), code = find('[data-code]', box), link = find('[data-run]', box);
  box.hidden = false;
  pre.textContent = '';
  code.textContent = 'goes on, also when this page is closed';
  if (link && page) { link.href = page; link.hidden = false; }
  const source = new EventSource(`/jobs/${job}/events`);
  const heard = (kind, use) => source.addEventListener(kind, event => use(JSON.parse(event.data)));
  heard('command', command => { pre.textContent = ''; find('[data-command]', box).textContent = command; });
  heard('text', text => append(pre, text));
  heard('code', value => { code.textContent = value ? `ended with exit code ${value}` : 'done'; source.close(); });
}

// Buttons of a run: a dialog each, which shows the command.
document.addEventListener('click', event => {
  const button = event.target.closest('[data-action]');
  if (button) {
    const dialog = find(`#dialog-${button.dataset.action}`);
    dialog.showModal();
    dialog.firstElementChild.dispatchEvent(new Event('input'));
  }
  if (event.target.closest('[data-close]')) event.target.closest('dialog').close();
});
for (const form of all('form[data-do]')) {
  const given = more => ({ action: form.dataset.name, fields: fieldsOf(form), dry_run: form.elements.dry_run?.checked, ...more });
  const command = find('[data-command]', form);
  form.addEventListener('input', () => ask(form.dataset.do, given({ only_show: true }))
    .then(found => { command.textContent = found.command; }, error => told(command, error)));
  form.addEventListener('submit', event => {
    event.preventDefault();
    ask(form.dataset.do, given({})).then(found => { form.closest('dialog').close(); follow(found.job); }, error => told(command, error));
  });
}

// The form of a first run.
const draft = find('#draft');
if (draft) {
  const config = find('#config'), text = config.elements.config, state = find('#draft-state'), verdict = find('#verdict');
  let waiting = 0, newest = 0, drafts = 0;
  const plan = () => {
    const mine = ++newest;
    if (!verdict.firstElementChild) verdict.textContent = 'being planned; the first look at a base takes longest';
    const given = { config: text.value, gpu: draft.elements.gpu.value };
    const use = found => { if (mine === newest) verdict.innerHTML = found.html; };
    ask('/new/plan', { ...given, quick: true })
      .then(found => { use(found); return mine === newest ? ask('/new/plan', given) : found; })
      .then(use, error => { if (mine === newest) told(verdict, error); });
  };
  const soon = (what, milliseconds) => { clearTimeout(waiting); waiting = setTimeout(what, milliseconds); };
  const make = () => {
    if (!draft.elements.base.value || !draft.elements.data.value) return;
    const mine = ++drafts;
    state.textContent = 'being made';
    ask('/new/draft', fieldsOf(draft)).then(found => {
      if (mine !== drafts) return;
      text.value = found.config;
      state.textContent = found.missing.join(' ');
      plan();
    }, error => told(state, error));
  };
  draft.addEventListener('submit', event => { event.preventDefault(); make(); });
  draft.addEventListener('change', () => soon(make, 50));
  text.addEventListener('input', () => soon(plan, 300));
  draft.elements.data.addEventListener('input', () => fetch(`/new/files?at=${encodeURIComponent(draft.elements.data.value)}`)
    .then(answer => answer.json()).then(names => {
      find('#files').replaceChildren(...names.map(name => Object.assign(document.createElement('option'), { value: name })));
    }));
  find('[data-check]', config)?.addEventListener('click', () => ask('/new/check', { config: text.value })
    .then(found => follow(found.job), error => told(state, error)));
  config.addEventListener('submit', event => {
    event.preventDefault();
    ask('/new/start', { config: text.value, path: config.elements.path.value, machine: draft.elements.machine.value }).then(found => {
      if (found.job) follow(found.job, found.run);
      else state.textContent = `${found.written} is written. Now: ${found.command}`;
    }, error => told(state, error));
  });
}

// A conversation.
const talk = find('#talk');
if (talk) {
  const state = find('#talk-state'), said = find('#said'), say = find('#say');
  let name = null, sides = {}, source = null;
  const turn = (who, text) => {
    const box = document.createElement('div'), head = document.createElement('h3'), pre = document.createElement('pre');
    box.className = 'turn'; head.textContent = who; pre.className = 'wrap'; pre.textContent = text;
    box.append(head, pre); said.append(box);
    box.scrollIntoView({ block: 'nearest' });
    return pre;
  };
  talk.addEventListener('submit', event => {
    event.preventDefault();
    source?.close();
    say.hidden = true;
    sides = {};
    state.textContent = 'the model is being loaded';
    ask(talk.dataset.talk, fieldsOf(talk)).then(found => {
      name = found.talk;
      said.replaceChildren();
      source = new EventSource(`/talks/${name}/events`);
      const heard = (kind, use) => source.addEventListener(kind, event => use(JSON.parse(event.data)));
      heard('log', text => { state.textContent = text; });
      heard('ready', () => { state.textContent = 'ready'; say.hidden = false; say.elements.text.focus(); });
      const of = side => sides[side] ??= turn(side === 'base' ? 'the base' : 'the checkpoint', '');
      heard('piece', ({ side, text }) => { of(side).textContent += text; });
      heard('answered', told => { told.sides.forEach(side => { of(side).textContent ||= '(nothing)'; }); sides = {}; say.elements.text.disabled = false; say.elements.text.focus(); });
      // The conversation ends when nobody listens, so a lost connection is its end.
      source.onerror = () => { state.textContent = 'The board does not answer. Begin anew.'; say.hidden = true; source.close(); };
      heard('end', text => { state.textContent = text; say.hidden = true; source.close(); });
    }, error => told(state, error));
  });
  const speak = text => ask(`/talks/${name}`, { text }).catch(error => told(state, error));
  say.addEventListener('submit', event => {
    event.preventDefault();
    const text = say.elements.text.value;
    turn('you', text);
    say.elements.text.value = '';
    say.elements.text.disabled = true;
    speak(text);
  });
  find('[data-fresh]', say).addEventListener('click', () => { said.replaceChildren(); speak(''); });
}
